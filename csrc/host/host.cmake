# The CPU loops, once for each instruction set; the processor at hand chooses among them at run time.
#
# -ffp-contract=off: a fused multiply-add rounds once where the definition rounds twice.
# -fno-math-errno, -fno-trapping-math: nobody reads errno or floating-point exceptions; values stay the same.
set(passes tap l1_norm fake_quantize batch_norm_act_forward batch_norm_act_backward
    batch_norm_act_double_backward table)
list(TRANSFORM passes PREPEND host/)
list(TRANSFORM passes APPEND .cpp)
set(exact -ffp-contract=off -fno-math-errno -fno-trapping-math)

function(add_instruction_set name)
  add_library(host_${name} OBJECT ${passes})
  target_compile_definitions(host_${name} PRIVATE GRADL1_ISA=${name})
  target_compile_options(host_${name} PRIVATE ${exact} ${counted} ${ARGN})
  target_link_libraries(_gradl1 PRIVATE host_${name})
endfunction()

add_instruction_set(base)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64)$" AND NOT GRADL1_BASE_ONLY)
  set(avx2 -mavx2 -mfma -mbmi -mbmi2)
  add_instruction_set(avx2 ${avx2})
  add_instruction_set(avx512 ${avx2} -mavx512f -mavx512bw -mavx512cd -mavx512dq -mavx512vl
    -mprefer-vector-width=512)
  target_compile_definitions(_gradl1 PRIVATE GRADL1_X86)
endif()

target_sources(_gradl1 PRIVATE host/dispatch.cpp host/engine.cpp host/pool.cpp)
target_compile_definitions(_gradl1 PRIVATE GRADL1_HAS_HOST)
target_link_libraries(_gradl1 PRIVATE ${CMAKE_DL_LIBS})
