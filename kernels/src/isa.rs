//! The choice of an instruction set, made once.

use crate::activations::Activations;
use crate::matmul::{Tile, TileShape};
use crate::matrix::{Matrix, WeightType};
#[cfg(target_arch = "aarch64")]
use crate::neon::Neon;
use crate::scalar;
#[cfg(target_arch = "x86_64")]
use crate::x86::{Avx2, Avx512};

/// The environment variable that overrides the choice.
const OVERRIDE: &str = "SLUICE_ISA";

/// Names of what is not on every CPU.
const OPTIONAL: [&str; 5] = ["avx2", "avxvnni", "avx512", "neon", "i8mm"];

/// Why the instruction set in `SLUICE_ISA` cannot be used.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IsaError {
    /// No kernels go by this name.
    #[error("SLUICE_ISA={name:?} names no instruction set; known are scalar, avx2, avxvnni, avx512, neon and i8mm")]
    Unknown {
        /// The name asked for.
        name: String,
    },
    /// This CPU, or this build, lacks the instructions.
    #[error("SLUICE_ISA={name}: this CPU lacks the instructions; available here: {available}")]
    Unavailable {
        /// The name asked for.
        name: String,
        /// Names that would work, separated by commas.
        available: String,
    },
}

/// The holder of a variant may execute its instructions: the tokens inside exist only if the CPU has them.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Isa {
    Scalar,
    #[cfg(target_arch = "x86_64")]
    Avx2(Avx2),
    #[cfg(target_arch = "x86_64")]
    Avx512(Avx512),
    #[cfg(target_arch = "aarch64")]
    Neon(Neon),
}

/// The kernels of one instruction set. All instruction sets give the same bits.
#[derive(Clone, Copy, Debug)]
pub struct Kernels {
    pub(crate) isa: Isa,
}

impl Kernels {
    /// The fastest kernels of this CPU, or those that the environment variable `SLUICE_ISA` names
    /// (`scalar`; `avx2`, `avxvnni`, `avx512` on x86-64; `neon`, `i8mm` on aarch64).
    ///
    /// # Errors
    /// If `SLUICE_ISA` names an unknown or an unavailable instruction set.
    pub fn detect() -> Result<Kernels, IsaError> {
        match std::env::var_os(OVERRIDE) {
            Some(name) => Self::named(&name.to_string_lossy()),
            None => Ok(Self::available().pop().unwrap_or(Self::scalar())),
        }
    }

    /// The kernels with this name.
    ///
    /// # Errors
    /// If there are none, or this CPU lacks the instructions.
    pub fn named(name: &str) -> Result<Kernels, IsaError> {
        let available = Self::available();
        if let Some(kernels) = available.iter().find(|k| k.isa_name() == name) {
            return Ok(*kernels);
        }
        let name = name.to_owned();
        if OPTIONAL.contains(&name.as_str()) {
            let names: Vec<_> = available.iter().map(Kernels::isa_name).collect();
            return Err(IsaError::Unavailable { name, available: names.join(", ") });
        }
        Err(IsaError::Unknown { name })
    }

    /// The portable kernels, which are the specification.
    pub fn scalar() -> Kernels {
        Kernels { isa: Isa::Scalar }
    }

    /// The kernels of every instruction set of this CPU, slowest first.
    pub fn available() -> Vec<Kernels> {
        #[cfg_attr(
            not(any(target_arch = "x86_64", target_arch = "aarch64")),
            expect(unused_mut, reason = "no name is added")
        )]
        let mut all = vec![Self::scalar()];
        #[cfg(target_arch = "x86_64")]
        {
            let eight_lanes = [Avx2::new(), Avx2::with_vnni()];
            all.extend(eight_lanes.into_iter().flatten().map(|token| Kernels { isa: Isa::Avx2(token) }));
            all.extend(Avx512::new().map(|token| Kernels { isa: Isa::Avx512(token) }));
        }
        #[cfg(target_arch = "aarch64")]
        {
            let four_lanes = [Neon::new(), Neon::with_i8mm()];
            all.extend(four_lanes.into_iter().flatten().map(|token| Kernels { isa: Isa::Neon(token) }));
        }
        all
    }

    /// `scalar`, `avx2`, `avxvnni`, `avx512`, `neon` or `i8mm`.
    pub fn isa_name(&self) -> &'static str {
        match self.isa {
            Isa::Scalar => "scalar",
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2(isa) => isa.name(),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512(_) => "avx512",
            #[cfg(target_arch = "aarch64")]
            Isa::Neon(isa) => isa.name(),
        }
    }

    /// Runs `f`, compiled for this instruction set. Compilers vectorise the loops of `f`; it must be inlined, and so must the
    /// functions that it calls. Compilers contract no operations, so the bits are the same.
    #[inline(always)]
    pub(crate) fn compiled<R>(&self, f: impl FnOnce() -> R) -> R {
        match self.isa {
            Isa::Scalar => f(),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2(isa) => isa.compiled(f),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512(isa) => isa.compiled(f),
            // NEON is part of every aarch64.
            #[cfg(target_arch = "aarch64")]
            Isa::Neon(_) => f(),
        }
    }

    /// Inner product of two vectors, in the lane structure that the `scalar` module documents.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn dot(&self, a: &[f32], b: &[f32]) -> f32 {
        assert_eq!(a.len(), b.len(), "an inner product takes two vectors of one length");
        match self.isa {
            Isa::Scalar => scalar::dot(a, b),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2(isa) => isa.dot(a, b),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512(isa) => isa.dot(a, b),
            #[cfg(target_arch = "aarch64")]
            Isa::Neon(isa) => isa.dot(a, b),
        }
    }

    /// `y += a·x`, one fused multiply-add per element.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn axpy(&self, a: f32, x: &[f32], y: &mut [f32]) {
        assert_eq!(x.len(), y.len(), "axpy takes two vectors of one length");
        match self.isa {
            Isa::Scalar => scalar::axpy(a, x, y),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2(isa) => isa.axpy(a, x, y),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512(isa) => isa.axpy(a, x, y),
            #[cfg(target_arch = "aarch64")]
            Isa::Neon(isa) => isa.axpy(a, x, y),
        }
    }

    /// Tokens of a tile: as many as AVX-512 keeps in registers. AVX2, and grouped types on both, keep sums in memory and unpack
    /// weights once for all tokens.
    pub(crate) fn tile_tokens(&self, ty: WeightType) -> usize {
        match (self.isa, ty) {
            #[cfg(target_arch = "x86_64")]
            (Isa::Avx2(_) | Isa::Avx512(_), WeightType::Grouped(_)) => crate::matmul::TILE_TOKENS,
            #[cfg(target_arch = "x86_64")]
            (Isa::Avx2(_), _) => crate::x86::AVX2_TOKENS,
            #[cfg(target_arch = "aarch64")]
            (Isa::Neon(isa), _) => isa.tile_tokens(),
            _ => 8,
        }
    }

    /// Multiplies one or two adjacent row groups with up to [`tile_tokens`](Self::tile_tokens) tokens.
    pub(crate) fn tile(&self, w: &Matrix<'_>, x: &Activations, shape: TileShape, out: &mut Tile) {
        match self.isa {
            Isa::Scalar => scalar_tile(w, x, shape, out),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2(isa) => isa.tile(w, x, shape, out),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512(isa) => isa.tile(w, x, shape, out),
            #[cfg(target_arch = "aarch64")]
            Isa::Neon(isa) => isa.tile(w, x, shape, out),
        }
    }
}

fn scalar_tile(w: &Matrix<'_>, x: &Activations, shape: TileShape, out: &mut Tile) {
    for (t, out) in out[..shape.tokens].iter_mut().enumerate() {
        for (g, out) in out.as_chunks_mut().0[..shape.groups].iter_mut().enumerate() {
            *out = scalar::group(&w.group(shape.group + g), x, shape.token + t, shape.int8);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_checked() {
        assert_eq!(Kernels::named("scalar").unwrap().isa_name(), "scalar");
        let unknown = Kernels::named("sse9").unwrap_err();
        assert_eq!(unknown, IsaError::Unknown { name: "sse9".into() });
        let names: Vec<_> = Kernels::available().iter().map(Kernels::isa_name).collect();
        for name in OPTIONAL {
            match Kernels::named(name) {
                Ok(k) => assert_eq!(k.isa_name(), name),
                Err(e) => assert!(!names.contains(&name) && matches!(e, IsaError::Unavailable { .. })),
            }
        }
    }

    /// Not a test by itself: prints what was detected, for the test below.
    #[test]
    #[ignore = "run by another test with SLUICE_ISA set"]
    fn say_what_is_detected() {
        match Kernels::detect() {
            Ok(k) => println!("detected={}", k.isa_name()),
            Err(e) => println!("error={e}"),
        }
    }

    /// The command that cargo uses to start this program: a program under an emulator cannot start itself.
    fn this_program() -> std::process::Command {
        let program = std::env::current_exe().unwrap();
        let runner = std::env::var("CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER").unwrap_or_default();
        let mut words = runner.split_whitespace().filter(|_| cfg!(target_arch = "aarch64"));
        let Some(runner) = words.next() else { return std::process::Command::new(program) };
        let mut command = std::process::Command::new(runner);
        command.args(words).arg(program);
        command
    }

    #[test]
    fn the_environment_overrides() {
        let run = |name: &str| {
            let output = this_program()
                .args(["--exact", "isa::tests::say_what_is_detected", "--ignored", "--nocapture"])
                .env(OVERRIDE, name)
                .output()
                .unwrap();
            String::from_utf8(output.stdout).unwrap()
        };
        for k in Kernels::available() {
            assert!(run(k.isa_name()).contains(&format!("detected={}", k.isa_name())));
        }
        assert!(run("sse9").contains("error=SLUICE_ISA=\"sse9\" names no instruction set"));
    }
}
