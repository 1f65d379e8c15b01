// What the shared library exports: the declarations of the public headers and nothing else; and
// names that go in 0.3, with what replaces them.
#pragma once

#if defined(__GNUC__)
#define MSA_API __attribute__((visibility("default")))
#define MSA_DEPRECATED(name) __attribute__((deprecated("use " name)))
#define MSA_UNION __extension__ union
#else
#define MSA_API
#define MSA_DEPRECATED(name)
#define MSA_UNION union
#endif
#define MSA_RENAMED(type, name, old) \
  MSA_UNION {                        \
    type name;                       \
    type old MSA_DEPRECATED(#name);  \
  }
