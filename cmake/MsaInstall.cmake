# Install rules: headers, both libraries, find_package(msa), pkg-config, and the command.
include(CMakePackageConfigHelpers)
include(GNUInstallDirs)

install(DIRECTORY include/msa TYPE INCLUDE)
install(TARGETS msa EXPORT msa_static_targets)
install(TARGETS msa_shared EXPORT msa_shared_targets)
if(TARGET msa_cli)
  install(TARGETS msa_cli)
endif()
install(FILES LICENSE TYPE DOC)

set(package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/msa)
install(EXPORT msa_static_targets NAMESPACE msa:: DESTINATION ${package_dir})
install(EXPORT msa_shared_targets NAMESPACE msa:: DESTINATION ${package_dir})
configure_package_config_file(cmake/msaConfig.cmake.in msaConfig.cmake
                              INSTALL_DESTINATION ${package_dir})
write_basic_package_version_file(msaConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/msaConfig.cmake ${PROJECT_BINARY_DIR}/msaConfigVersion.cmake
        DESTINATION ${package_dir})

set(pkgconfig_private "-lstdc++ -lm -pthread")
if(MSA_WITH_CUDA)
  string(APPEND pkgconfig_private " ${CUDA_cudart_static_LIBRARY} -ldl -lrt")
endif()
file(RELATIVE_PATH pkgconfig_to_prefix /${CMAKE_INSTALL_LIBDIR}/pkgconfig /)
configure_file(cmake/msa.pc.in msa.pc @ONLY)
install(FILES ${PROJECT_BINARY_DIR}/msa.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig)
