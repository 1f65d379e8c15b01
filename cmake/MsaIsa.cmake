include(CheckCXXCompilerFlag)

# Adds src/cpu/NAME/*.cc to `target`, compiled with the given instruction-set flags. Which of these
# backends runs is decided at run time, so every build has all of them.
function(msa_add_isa target name)
  string(REPLACE ";" " " flags "${ARGN}")
  check_cxx_compiler_flag("${flags}" MSA_HAVE_FLAGS_${name})
  if(NOT MSA_HAVE_FLAGS_${name})
    message(FATAL_ERROR "${CMAKE_CXX_COMPILER} does not accept ${flags}, needed for the ${name} "
                        "backend; g++ >= 12 and clang >= 16 do")
  endif()
  file(GLOB sources CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/src/cpu/${name}/*.cc)
  target_sources(${target} PRIVATE ${sources})
  set_source_files_properties(${sources} PROPERTIES COMPILE_OPTIONS
    "${ARGN};$<$<CXX_COMPILER_ID:GNU>:-Wno-maybe-uninitialized>")  # g++ 12 blames its own intrinsics
endfunction()
