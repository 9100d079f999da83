//! The terms of a strip, decoded, for vectors of any width.

/// Decodes group `$i`, to which `$per_group` blocks belong, of scales of format `$s` with `$z` beside them. A macro, so that it
/// becomes part of the loops over groups, whatever compilers make of its size.
macro_rules! group {
    ($terms:ident, $planes:ident, $i:expr, $per_group:expr, $s:ident, $z:ident) => {{
        let at = $i * const { ROW_GROUP * group_len($s, $z) };
        let (zeros, blocks) = (at + const { ROW_GROUP * scale_len($s) }, $i * $per_group..($i + 1) * $per_group);
        let a = mul_ps(numbers::<$s>($planes, at), $terms.unit);
        let rest = match $z {
            NONE => None,
            BYTE => {
                let number = sub_epi32($terms.middle, cvtepu8_epi32(quarter($planes, zeros)));
                // Where blocks have two halves, each has a group of its own.
                Some($terms.pair(blocks.start, number))
            }
            BIAS => Some(cast(numbers::<$s>($planes, zeros))),
            _ => Some(minus(mul_ps(a, numbers::<$s>($planes, zeros)))),
        };
        for block in blocks {
            $terms.a[block] = a;
            if let Some(rest) = rest {
                $terms.rest[block] = rest;
            }
        }
    }};
}

/// The type `Terms` for one instruction set, and `row_factors`.
///
/// Who calls it provides `N`, the row groups of a vector, `bias`, what was added to the integers of a type, `wide`, `half` and
/// `quarter`, which load 32, 16 and 8 bytes of each row group, `two_quarters`, which loads two times 8 bytes that are neighbours,
/// `f16s`, `bf16s`, `e4m3s` and `e8m0s`, which make of them one number per row, and the intrinsics under the names that they have
/// without `_mm256_` or `_mm512_`.
macro_rules! terms {
    ($features:tt, $floats:ty, $integers:ty) => {
        /// The factors and summands of the blocks of a strip, by block of 16 or 32 columns.
        #[derive(Clone, Copy)]
        pub(in crate::x86) struct Terms {
            /// `A`.
            pub(in crate::x86) a: [$floats; 2 * STRIP],
            /// The bits of `B` if the type has it. Otherwise a pair of 16-bit numbers by which the sum of the activations is
            /// multiplied, to remove `z` and the number that was added to the integers; the number is the lower one, and the upper
            /// one is 0. In the second block of 32 columns it is the other way round, so that each meets its half in the pair of
            /// sums.
            pub(in crate::x86) rest: [$integers; 2 * STRIP],
            // Values that do not change: the unit, the negative of the number that is subtracted from all integers, whether blocks
            // have 16 columns, the groups of a strip, and the blocks to which one group applies.
            unit: $floats,
            middle: $integers,
            halves: bool,
            groups: usize,
            per_group: usize,
        }

        impl Terms {
            /// Terms with the values that are the same for all blocks of a type.
            #[target_feature(enable = $features)]
            pub(in crate::x86) fn new(ty: Grouped) -> Self {
                let blocks = SUPER_BLOCK / ty.block();
                let groups = match ty.scales() {
                    Scales::Groups { columns: GroupSize::Columns(columns), .. } => SUPER_BLOCK / usize::from(columns),
                    _ => 1,
                };
                let mut terms = Terms {
                    a: [setzero_ps(); 2 * STRIP],
                    rest: [setzero(); 2 * STRIP],
                    unit: set1_ps(unit(ty)),
                    middle: set1_epi32(-(ty.middle() + bias(ty.codes()))),
                    halves: has_halves(ty),
                    groups,
                    per_group: blocks / groups,
                };
                if !has_bias(ty) {
                    for block in 0..2 * STRIP {
                        terms.rest[block] = terms.pair(block, terms.middle);
                    }
                }
                terms
            }

            /// The number that removes a given number, for each row, from the integers of a block.
            #[inline]
            #[target_feature(enable = $features)]
            fn pair(&self, block: usize, number: $integers) -> $integers {
                let second = self.halves && block % 2 == 1;
                if second { slli_epi32::<16>(number) } else { and(number, set1_epi32(0xffff)) }
            }

            /// Decodes a strip.
            #[inline(never)]
            #[target_feature(enable = $features)]
            pub(in crate::x86) fn fill(&mut self, ty: Grouped, w: &[Group<'_>; N], strip: usize) {
                match ty.scales() {
                    // There is only one group, and it stays.
                    Scales::Groups { columns: GroupSize::Row, .. } if strip > 0 => {}
                    Scales::Groups { scale: ScaleType::F16, zero, .. } => self.scales::<F16>(zero, w, strip),
                    Scales::Groups { scale: ScaleType::Bf16, zero, .. } => self.scales::<BF16>(zero, w, strip),
                    Scales::Groups { scale: ScaleType::F32, zero, .. } => self.scales::<F32>(zero, w, strip),
                    Scales::Groups { scale: ScaleType::E4m3, zero, .. } => self.scales::<E4M3>(zero, w, strip),
                    Scales::Groups { scale: ScaleType::E8m0, zero, .. } => self.scales::<E8M0>(zero, w, strip),
                    Scales::Super(scales) => {
                        let len = ROW_GROUP * scales.row_len();
                        let planes = each!(w[0].scales; N, i => &w[i].scales[strip * len..][..len]);
                        match scales {
                            Super::Signed => self.signed_scales(&planes),
                            Super::InCodes | Super::Shift => self.scales_of_records(ty.codes(), &planes, w, strip),
                            Super::SixMin => self.six_bit_minima(&planes),
                            Super::FourMin => self.four_bit_minima(&planes),
                            _ => self.integer_scales(scales, &planes),
                        }
                    }
                }
            }

            #[inline]
            #[target_feature(enable = $features)]
            fn scales<const S: u8>(&mut self, zero: Zero, w: &[Group<'_>; N], strip: usize) {
                match zero {
                    Zero::None => self.groups::<S, NONE>(w, strip),
                    Zero::Byte => self.groups::<S, BYTE>(w, strip),
                    Zero::Bias => self.groups::<S, BIAS>(w, strip),
                    Zero::Float => self.groups::<S, FLOAT>(w, strip),
                }
            }

            /// Groups of a strip, or of what there is of it. Where their number is a constant, loops become stores.
            #[inline]
            #[target_feature(enable = $features)]
            fn groups<const S: u8, const Z: u8>(&mut self, w: &[Group<'_>; N], strip: usize) {
                let len = const { ROW_GROUP * group_len(S, Z) };
                let from = strip * self.groups * len + const { if S == E4M3 { 4 * ROW_GROUP } else { 0 } };
                let to = (from + self.groups * len).min(w[0].scales.len());
                let planes = each!(w[0].scales; N, i => &w[i].scales[from..to]);
                let n = (to - from) / len;
                match n {
                    16 => self.constant_groups::<S, Z, 16>(&planes),
                    8 if self.per_group == 1 => self.constant_groups::<S, Z, 8>(&planes),
                    4 if self.per_group == 2 => self.constant_groups::<S, Z, 4>(&planes),
                    2 if self.per_group == 4 => self.constant_groups::<S, Z, 2>(&planes),
                    _ => {
                        let planes = &planes;
                        for i in 0..n {
                            group!(self, planes, i, self.per_group, S, Z);
                        }
                    }
                }
            }

            /// `G` groups, the blocks of a strip shared out among them, at most one group to a block. A function by itself: as parts of
            /// [`fill`](Self::fill), there are so many that compilers leave what they call in functions of their own.
            #[inline(never)]
            #[target_feature(enable = $features)]
            fn constant_groups<const S: u8, const Z: u8, const G: usize>(&mut self, planes: &[&[u8]; N]) {
                let planes = &each!(planes[0]; N, i => &planes[i][..const { G * ROW_GROUP * group_len(S, Z) }]);
                for i in 0..G {
                    group!(self, planes, i, const { if G < STRIP { STRIP / G } else { 1 } }, S, Z);
                }
            }

            /// Per 32 columns a byte each for `s` and `m`.
            #[inline]
            #[target_feature(enable = $features)]
            fn six_bit_minima(&mut self, planes: &[&[u8]; N]) {
                let planes = &each!(planes[0]; N, i => &planes[i][..const { (4 + 2 * STRIP) * ROW_GROUP }]);
                let (d, dmin) = (f16s(half(planes, 0)), f16s(half(planes, 2 * ROW_GROUP)));
                for block in 0..STRIP {
                    let (s, m) = two_quarters(planes, (4 + 2 * block) * ROW_GROUP);
                    self.a[block] = mul_ps(d, cvtepi32_ps(cvtepu8_epi32(s)));
                    self.rest[block] = minus(mul_ps(dmin, cvtepi32_ps(cvtepu8_epi32(m))));
                }
            }

            /// Per 16 columns a nibble each.
            #[inline]
            #[target_feature(enable = $features)]
            fn four_bit_minima(&mut self, planes: &[&[u8]; N]) {
                let (d, dmin) = (f16s(half(planes, 0)), f16s(half(planes, 2 * ROW_GROUP)));
                for block in 0..2 * STRIP {
                    let both = cvtepu8_epi32(quarter(planes, (4 + block) * ROW_GROUP));
                    self.a[block] = mul_ps(d, cvtepi32_ps(and(both, set1_epi32(15))));
                    self.rest[block] = minus(mul_ps(dmin, cvtepi32_ps(srli_epi32::<4>(both))));
                }
            }

            /// Per 16 columns a signed byte.
            #[inline]
            #[target_feature(enable = $features)]
            fn signed_scales(&mut self, planes: &[&[u8]; N]) {
                let planes = &each!(planes[0]; N, i => &planes[i][..const { (2 + 2 * STRIP) * ROW_GROUP }]);
                let d = f16s(half(planes, 0));
                for block in 0..STRIP {
                    let (first, second) = two_quarters(planes, (2 + 2 * block) * ROW_GROUP);
                    self.a[2 * block] = mul_ps(mul_ps(d, cvtepi32_ps(cvtepi8_epi32(first))), self.unit);
                    self.a[2 * block + 1] = mul_ps(mul_ps(d, cvtepi32_ps(cvtepi8_epi32(second))), self.unit);
                }
            }

            /// Units of one byte or none.
            #[inline]
            #[target_feature(enable = $features)]
            fn integer_scales(&mut self, scales: Super, planes: &[&[u8]; N]) {
                let d = f16s(half(planes, 0));
                let units = 2 * ROW_GROUP;
                for block in 0..if self.halves { 2 * STRIP } else { STRIP } {
                    let byte = |per_unit: usize| units + block / per_unit * ROW_GROUP;
                    let integer = match scales {
                        Super::Plain => set1_epi32(1),
                        Super::SixBy16 | Super::SixBy32 => {
                            sub_epi32(cvtepu8_epi32(quarter(planes, byte(1))), set1_epi32(32))
                        }
                        _ => {
                            let both = cvtepu8_epi32(quarter(planes, byte(2)));
                            let s = match (scales, block % 2) {
                                (_, 0) => both,
                                (Super::ShiftBy16, _) => srli_epi32::<3>(both),
                                _ => srli_epi32::<4>(both),
                            };
                            let s = and(s, set1_epi32(if scales == Super::ShiftBy16 { 7 } else { 15 }));
                            add_epi32(add_epi32(s, s), set1_epi32(1))
                        }
                    };
                    self.a[block] = mul_ps(mul_ps(d, cvtepi32_ps(integer)), self.unit);
                }
            }

            /// Odd integers that are in the records of grids: bits 12..15 of the last field of IQ1_S, else 28..32.
            #[inline]
            #[target_feature(enable = $features)]
            fn scales_of_records(&mut self, codes: Codes, planes: &[&[u8]; N], w: &[Group<'_>; N], strip: usize) {
                let d = f16s(half(planes, 0));
                let len = ROW_GROUP * codes.block_len();
                for block in 0..STRIP {
                    let end = (strip * STRIP + block + 1) * len;
                    let values = each!(w[0].values; N, i => w[i].values);
                    let s = if codes == Codes::Iq1s {
                        let words = cvtepu16_epi32(half(&values, end - 2 * ROW_GROUP));
                        and(srli_epi32::<12>(words), set1_epi32(7))
                    } else {
                        srli_epi32::<28>(wide(&values, end - 4 * ROW_GROUP))
                    };
                    let integer = add_epi32(add_epi32(s, s), set1_epi32(1));
                    self.a[block] = mul_ps(mul_ps(d, cvtepi32_ps(integer)), self.unit);
                }
            }
        }

        /// One number of a scale type for each row.
        #[inline]
        #[target_feature(enable = $features)]
        fn numbers<const S: u8>(planes: &[&[u8]; N], at: usize) -> $floats {
            match S {
                F16 => f16s(half(planes, at)),
                BF16 => bf16s(half(planes, at)),
                F32 => cast_back(wide(planes, at)),
                E4M3 => e4m3s(quarter(planes, at)),
                _ => e8m0s(planes, at),
            }
        }

        /// The bits of the negated number.
        #[inline]
        #[target_feature(enable = $features)]
        fn minus(v: $floats) -> $integers {
            xor(cast(v), set1_epi32(i32::MIN))
        }

        /// The factors of the rows, or ones.
        #[inline]
        #[target_feature(enable = $features)]
        pub(in crate::x86) fn row_factors(ty: Grouped, w: &[Group<'_>; N]) -> $floats {
            let planes = each!(w[0].scales; N, i => w[i].scales);
            if ty.has_row_factor() { cast_back(wide(&planes, 0)) } else { set1_ps(1.0) }
        }
    };
}
