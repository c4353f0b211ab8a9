# The CUDA kernels; with GRADL1_EMULATE the same sources, compiled by the C++ compiler and run on the CPU.
#
# --fmad=false: the definition rounds after every operation, and masks are recomputed from equal bits.
set(kernels tap l1_norm fake_quantize batch_norm_act_forward batch_norm_act_backward
    batch_norm_act_double_backward)
list(TRANSFORM kernels PREPEND cuda/)
list(TRANSFORM kernels APPEND .cu)

if(GRADL1_EMULATE)
  set_source_files_properties(${kernels} PROPERTIES LANGUAGE CXX
    COMPILE_OPTIONS "-xc++;-ffp-contract=off;${counted}")
  target_compile_definitions(_gradl1 PRIVATE GRADL1_EMULATED)
  target_compile_options(_gradl1 PRIVATE -Wno-unknown-pragmas)
  target_sources(_gradl1 PRIVATE testing/emulation.cpp)
  set(compiler emulated)
else()
  # One PTX, of the oldest architecture asked for, becomes machine code for each and is kept for GPUs that
  # are not among them: no kernel uses what is newer, and the front end, half of the work, runs once.
  if(GRADL1_CUDA_ARCHS STREQUAL "native")
    set(code -arch=native)
  else()
    list(SORT GRADL1_CUDA_ARCHS COMPARE NATURAL)
    list(GET GRADL1_CUDA_ARCHS 0 oldest)
    list(JOIN GRADL1_CUDA_ARCHS ",sm_" code)
    set(code "--generate-code=arch=compute_${oldest},code=[compute_${oldest},sm_${code}]")
  endif()
  set(CMAKE_CUDA_FLAGS_RELEASE "-O3")
  enable_language(CUDA)
  set_target_properties(_gradl1 PROPERTIES
    CUDA_ARCHITECTURES OFF CUDA_RUNTIME_LIBRARY Static CUDA_STANDARD 17)
  set(compiler "${CMAKE_CUDA_COMPILER_ID} ${CMAKE_CUDA_COMPILER_VERSION}")
  set(strict "$<$<BOOL:${GRADL1_WERROR}>:-Werror=all-warnings;-Xptxas=-v>")
  target_compile_options(_gradl1 PRIVATE
    "$<$<COMPILE_LANGUAGE:CUDA>:${code};--fmad=false;--extended-lambda;${strict}>")
endif()

target_sources(_gradl1 PRIVATE ${kernels} cuda/engine.cpp)
string(REPLACE ";" " " shown "${GRADL1_CUDA_ARCHS}")  # a list would become several definitions
target_compile_definitions(_gradl1 PRIVATE GRADL1_HAS_CUDA
  GRADL1_CUDA_COMPILER="${compiler}" GRADL1_CUDA_ARCHITECTURES="${shown}")
