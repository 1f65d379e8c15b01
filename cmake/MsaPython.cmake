# Sets MSA_WITH_PYTHON: whether this build has the Python extension (option MSA_BUILD_PYTHON = AUTO,
# ON or OFF). It needs the headers of a Python >= 3.10 that has nanobind; .venv comes first.
set(MSA_WITH_PYTHON OFF)
if(NOT MSA_BUILD_PYTHON STREQUAL "OFF")
  if(NOT SKBUILD AND NOT DEFINED Python_EXECUTABLE
     AND EXISTS ${PROJECT_SOURCE_DIR}/.venv/bin/python3)
    set(Python_EXECUTABLE ${PROJECT_SOURCE_DIR}/.venv/bin/python3)
  endif()
  find_package(Python 3.10 QUIET COMPONENTS Interpreter Development.Module
               OPTIONAL_COMPONENTS Development.SABIModule)
  if(Python_FOUND)
    execute_process(COMMAND ${Python_EXECUTABLE} -m nanobind --cmake_dir
                    OUTPUT_VARIABLE nanobind_ROOT OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
    find_package(nanobind CONFIG QUIET)
  endif()
  if(Python_FOUND AND nanobind_FOUND)
    set(MSA_WITH_PYTHON ON)
  elseif(MSA_BUILD_PYTHON STREQUAL "ON")
    message(FATAL_ERROR "MSA_BUILD_PYTHON is ON, but there is no Python with headers and nanobind; "
                        "set Python_EXECUTABLE, or configure with -DMSA_BUILD_PYTHON=OFF")
  endif()
endif()
message(STATUS "Python extension: ${MSA_WITH_PYTHON}")
