# Sets MSA_WITH_CUDA: whether this build has the CUDA backend (option MSA_CUDA = AUTO, ON or OFF).
set(MSA_WITH_CUDA OFF)
if(NOT MSA_CUDA STREQUAL "OFF")
  if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)  # of the plain kernels; PTX serves what comes later
    set(CMAKE_CUDA_ARCHITECTURES 80-real 90-real 80-virtual)
  endif()
  include(CheckLanguage)
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    enable_language(CUDA)
    find_package(CUDAToolkit REQUIRED)
    if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION)  # CMake 3.25.1 does not know that nvcc has C++20
      set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION -std=c++20)
      set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION -std=c++20)
    endif()
    set(CMAKE_CUDA_STANDARD 20)
    set(CMAKE_CUDA_STANDARD_REQUIRED ON)
    set(MSA_WITH_CUDA ON)
  elseif(MSA_CUDA STREQUAL "ON")
    message(FATAL_ERROR "MSA_CUDA is ON, but no CUDA compiler was found; set CUDACXX to nvcc "
                        "or configure with -DMSA_CUDA=OFF")
  endif()
endif()
# Adds the given kernels to `libraries`, compiled for `architectures`.
function(msa_add_kernels name libraries architectures)
  if(NOT ARGN)
    return()
  endif()
  add_library(${name} OBJECT ${ARGN})
  target_include_directories(${name} PRIVATE ${PROJECT_SOURCE_DIR}/include
                             ${PROJECT_SOURCE_DIR}/src)
  set_target_properties(${name} PROPERTIES CUDA_ARCHITECTURES "${architectures}"
                        CUDA_VISIBILITY_PRESET hidden VISIBILITY_INLINES_HIDDEN ON)
  # Debug builds trap on bad lengths, ids and pages, with a message.
  target_compile_definitions(${name} PRIVATE $<$<CONFIG:Debug>:MSA_CHECKED>)
  foreach(library ${libraries})
    target_sources(${library} PRIVATE $<TARGET_OBJECTS:${name}>)
  endforeach()
endfunction()

message(STATUS "CUDA backend: ${MSA_WITH_CUDA}")
