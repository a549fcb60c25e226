# Turns CUDA C++ into C++ for the stand-in in include/; run with sed -E. Line numbers stay.
#   kernel<T><<<grid, block, smem>>>(args);        cuda_launch(CUDA_KERNEL(kernel<T>), grid, block, smem)(args);
#   __shared__ float tile[32][33];                 CUDA_SHARED(tile, [32][33], float);
#   extern __shared__ __align__(16) float rows[];  float* rows = (float*)cuda_dynamic_shared();
#   #pragma unroll                                 nothing: clang++ heeds it, in loops that are a warp's on a GPU
# A launch may span lines, also before <<<; the kernel's name and its template arguments stand on one line.

s/^ *#pragma unroll.*//

/__shared__/ {
    s/(__align__|alignas)\([^()]*\) *//g
    s/extern +__shared__ +([^;]*[^; ]) +([A-Za-z_0-9]+)\[\] *;/\1* \2 = (\1*)cuda_dynamic_shared();/g
    :declarators
    s/__shared__ +([A-Za-z_0-9: ]+) +([A-Za-z_0-9]+(\[[^]]*\])*), *([^;]*;)/__shared__ \1 \2; __shared__ \1 \4/
    t declarators
    s/(static +)?__shared__ +([^;[]*[^;[ ]) +([A-Za-z_0-9]+)((\[[^]]*\])*) *;/CUDA_SHARED(\3, \4, \2);/g
}

/_kernel(<[A-Za-z_0-9:, ]*>)?$/N
/\/\/.*<<</b
/[A-Za-z_0-9>][ \n]*<<</ {
    # \x01 stands for >>>, so that "up to the next >>>" can be said
    :join
    s/>>>/\x01/g
    /<<<[^\x01]*$/ {
        $! {
            N
            b join
        }
    }
    :launch
    s/([A-Za-z_][A-Za-z_0-9:]*(<[A-Za-z_0-9:, <>*+-]*>)?)([ \n]*)<<<([^\x01]*)\x01/cuda_launch(CUDA_KERNEL(\1),\3 \4)/
    t launch
    s/\x01/>>>/g
}
