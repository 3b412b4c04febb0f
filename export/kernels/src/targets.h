// Compile what follows for an instruction set, without a compiler flag.
#pragma once

#include <stdint.h>
#include <string.h>

#define SD_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define SD_TARGET(features) SD_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define SD_TARGET_END _Pragma("clang attribute pop")
#else
// GCC instantiates templates at the end of the file, under the options that hold there: they are not reset.
#define SD_TARGET(features) SD_PRAGMA(GCC target features)
#define SD_TARGET_END
#endif
