# Build step: writes OUTPUT, a header that defines MSA_COMMIT, when the commit of SOURCE has changed;
# COMMIT, if it is not empty, names that of sources without a repository.
if(NOT COMMIT)
  execute_process(COMMAND git -C "${SOURCE}" describe --always --dirty --abbrev=12 --exclude=*
                  OUTPUT_VARIABLE COMMIT OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET
                  RESULT_VARIABLE failed)
  if(failed)
    set(COMMIT unknown)
  endif()
endif()
file(CONFIGURE OUTPUT "${OUTPUT}" CONTENT "#define MSA_COMMIT \"${COMMIT}\"\n" @ONLY)
