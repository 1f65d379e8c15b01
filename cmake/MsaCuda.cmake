# Sets MSA_WITH_CUDA: whether this build has the CUDA backend (option MSA_CUDA = AUTO, ON or OFF).
set(MSA_WITH_CUDA OFF)
if(NOT MSA_CUDA STREQUAL "OFF")
  if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
    set(CMAKE_CUDA_ARCHITECTURES 90a)  # Hopper: wgmma and TMA exist nowhere else
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
message(STATUS "CUDA backend: ${MSA_WITH_CUDA}")
