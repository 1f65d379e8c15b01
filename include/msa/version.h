/* Version of these headers, for C and C++. */
#pragma once

#define MSA_VERSION_MAJOR 0
#define MSA_VERSION_MINOR 1
#define MSA_VERSION_PATCH 0
#define MSA_VERSION_STRING "0.1.0"
