//! No kernel reads or writes a byte beyond its operands: after each operand lies an inaccessible page.

use crate::common::*;
use sluice_kernels::*;

/// Memory that ends where an inaccessible page begins.
struct Guarded {
    map: *mut u8,
    map_len: usize,
    page: usize,
    len: usize,
}

impl Guarded {
    fn new(bytes: &[u8]) -> Self {
        // SAFETY: sysconf has no preconditions.
        let page = usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap();
        let map_len = bytes.len().next_multiple_of(page) + page;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANON;
        // SAFETY: a fresh anonymous mapping at an address of the system's choice.
        let map =
            unsafe { libc::mmap(std::ptr::null_mut(), map_len, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
        assert_ne!(map, libc::MAP_FAILED);
        let map = map.cast::<u8>();
        // SAFETY: the last page of the mapping made above.
        let rc = unsafe { libc::mprotect(map.add(map_len - page).cast(), page, libc::PROT_NONE) };
        assert_eq!(rc, 0);
        let guarded = Guarded { map, map_len, page, len: bytes.len() };
        // SAFETY: `start` lies `len` bytes before the guard page, inside the mapping.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), guarded.start(), bytes.len()) };
        guarded
    }

    fn floats(x: &[f32]) -> Self {
        Self::new(&x.iter().flat_map(|v| v.to_ne_bytes()).collect::<Vec<_>>())
    }

    fn start(&self) -> *mut u8 {
        self.map.wrapping_add(self.map_len - self.page - self.len)
    }

    fn bytes(&self) -> &[u8] {
        // SAFETY: `len` initialised bytes inside the mapping, which lives as long as self.
        unsafe { std::slice::from_raw_parts(self.start(), self.len) }
    }

    fn f32s(&self) -> &[f32] {
        // SAFETY: as above; a page boundary minus a multiple of 4 is aligned, and any bits are an f32.
        unsafe { std::slice::from_raw_parts(self.start().cast(), self.len / 4) }
    }

    fn f32s_mut(&mut self) -> &mut [f32] {
        // SAFETY: as above, and self is mutably borrowed.
        unsafe { std::slice::from_raw_parts_mut(self.start().cast(), self.len / 4) }
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `new` and no reference into it outlives self.
        unsafe { libc::munmap(self.map.cast(), self.map_len) };
    }
}

#[test]
fn products_stay_inside() {
    let mut rng = Rng(1);
    let pool = ThreadPool::new(2);
    for ty in WeightType::all() {
        for (rows, cols, n) in [(1, 1, 1), (8, 2, 3), (9, 3, 4), (16, 32, 1), (17, 33, 9), (40, 128, 2), (31, 300, 5)] {
            let cols = cols_of(ty, cols);
            let data = Guarded::new(&matrix(ty, rows, cols, &mut rng));
            let w = Matrix::new(ty, rows, cols, data.bytes()).unwrap();
            let x = Guarded::floats(&rng.vec(n * cols));
            for precision in PRECISIONS {
                let a = activations(x.f32s(), n, cols, precision);
                let mut y = Guarded::floats(&vec![f32::NAN; n * rows]);
                for k in Kernels::available() {
                    k.matmul(&pool, w, &a, y.f32s_mut());
                    assert!(y.f32s().iter().all(|v| v.is_finite()));
                }
            }
            let mut y = Guarded::floats(&vec![f32::NAN; rows]);
            for k in Kernels::available() {
                k.matvec_f32(w, &x.f32s()[..cols], y.f32s_mut(), &mut Activations::new(Precision::Exact));
            }
        }
        for (width, cols) in [(1usize, 1), (9, 70), (24, 129)] {
            let cols = cols_of(ty, cols);
            let rows = 2 * width.div_ceil(8) * 8;
            let data = Guarded::new(&matrix(ty, rows, cols, &mut rng));
            let w = Matrix::new(ty, rows, cols, data.bytes()).unwrap();
            let a = activations(&rng.vec(3 * cols), 3, cols, Precision::Int8);
            let mut h = Guarded::floats(&vec![f32::NAN; 3 * width]);
            for k in Kernels::available() {
                k.gate_up(&pool, w, width, Activation::Silu, &a, h.f32s_mut());
                assert!(h.f32s().iter().all(|v| v.is_finite()));
            }
        }
    }
}

#[test]
fn vectors_stay_inside() {
    let mut rng = Rng(2);
    for len in (0..70).chain([128, 577]) {
        let (a, b) = (Guarded::floats(&rng.vec(len)), Guarded::floats(&rng.vec(len)));
        let mut y = Guarded::floats(&rng.vec(len));
        for k in Kernels::available() {
            k.dot(a.f32s(), b.f32s());
            k.axpy(0.5, a.f32s(), y.f32s_mut());
        }
        rms_norm(a.f32s(), b.f32s(), 1e-6, y.f32s_mut());
        softmax(y.f32s_mut());
        rope(y.f32s_mut(), &a.f32s()[..len / 2], &b.f32s()[..len / 2], RopePairing::Half);
        rope(y.f32s_mut(), &a.f32s()[..len / 2], &b.f32s()[..len / 2], RopePairing::Interleaved);
        let mut out = Vec::new();
        top_k(a.f32s(), 4, &mut out);
    }
}

/// Two queries, and then many, meet the first `s` keys and values.
fn attend(k: Kernels, queries: &Guarded, s: usize, keys: KvRows<'_>, values: KvRows<'_>, value: usize) {
    let queries = queries.f32s();
    let key = queries.len() / 2;
    for n in [2, 31] {
        let mut tile = QueryTile::default();
        tile.begin(key, value, 1.0);
        for query in queries.chunks_exact(key).cycle().take(n) {
            tile.add(0..s, Some(0.1)).copy_from_slice(query);
        }
        k.attend_block(&mut tile, &KeyBlock::new(0..s, keys, values).before(Some(keys)));
        tile.finish();
        assert!(tile.results().iter().all(|v| v.is_finite()));
    }
}

#[test]
fn attention_stays_inside() {
    let mut rng = Rng(3);
    for (s, k_dim, v_dim, stride) in
        [(1, 3, 2, 3), (5, 33, 31, 40), (9, 64, 64, 64), (6, 96, 72, 100), (3, 577, 515, 577), (64, 128, 128, 128)]
    {
        let queries = Guarded::floats(&rng.vec(2 * k_dim));
        // The last row ends where the part that is used ends.
        let numbers = |width: usize, rng: &mut Rng| Guarded::floats(&rng.vec((s - 1) * stride + width));
        let (keys, values) = (numbers(k_dim, &mut rng), numbers(v_dim, &mut rng));
        for k in Kernels::available() {
            let (keys, values) = (KvRows::plain(keys.f32s(), stride), KvRows::plain(values.f32s(), stride));
            attend(k, &queries, s, keys, values, v_dim);
        }
        for ty in [KvType::F16, KvType::Bf16, KvType::Q8] {
            let (values_len, scales_len) = packed_row(ty, stride);
            let part = |width: usize, rng: &mut Rng| {
                let (values, scales) = packed_row(ty, width);
                let codes = small_numbers(ty, (s - 1) * values_len + values, rng);
                (Guarded::new(&codes), Guarded::new(&small_scales((s - 1) * scales_len + scales, rng)))
            };
            let (keys, values) = (part(k_dim, &mut rng), part(v_dim, &mut rng));
            let keys = KvRows::packed(ty, stride, keys.0.bytes(), keys.1.bytes());
            let values = KvRows::packed(ty, stride, values.0.bytes(), values.1.bytes());
            for k in Kernels::available() {
                attend(k, &queries, s, keys, values, v_dim);
            }
        }
    }
}
