"""A layer's local map at the price of a few matrix products: the algebra behind the PyTorch path.

Up to the two per-row scalars s1_i, s2_i, everything a contribution vector goes through is one fixed
linear map of the layer, M = diag(gamma2) C diag(gamma1) C with C the centring x - mean(x). With
u^h_j = M W_O^h v^h_j,

    ||c_ij|| = || sum_h alpha^h_ij u^h_j + [i=j] M x_i || / (s1_i s2_i).

For each key j the H vectors u^h_j (and M x_j) span at most H + 1 dimensions. The triangular factor R_j of
U_j = [u^1_j .. u^H_j, M x_j] = Q_j R_j holds all their lengths and angles, so the norm is ||R_j alpha_ij||:
H(H+1)/2 multiply-adds a pair instead of H d, and n H^2 numbers instead of n^2 d. R_j is the Cholesky factor
of the Gram matrix of U_j, which is accumulated in float64 where vectors cancel and so keeps the rounding
error that of the direct sum in float32; float64 models get it from a QR decomposition.

Everything is evaluated in blocks of query rows, so memory is linear in n.

The files, in the order in which a layer passes them:

    backend.py              the protocol of a backend and the choice of one
    torch_backend.py        PyTorch, on any device; triton_backend.py the kernels; reference_backend.py the equations
    weight_cache.py         what depends on the weights alone, cached until they change
    layer_norms.py          M, and s1, s2 of every row
    head_factors.py         R_j of every token
    attention_weights.py    alpha in blocks, recomputed or as the model gave it
    layer_map.py            A in blocks, stored, or put together of two; rows times A
    completeness.py         whether the parts add up
"""
