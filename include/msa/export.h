// What the shared library exports: the declarations of the public headers and nothing else.
#pragma once

#if defined(__GNUC__)
#define MSA_API __attribute__((visibility("default")))
#else
#define MSA_API
#endif
