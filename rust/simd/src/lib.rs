//! Which vector instructions are used: the best that the processor has, asked at run time, or those that the
//! environment names. One binary runs everywhere, and a test can force every level.

use std::env;
use std::sync::OnceLock;

/// The environment variable that forces a level: `scalar`, `neon`, `avx2`, `avx512` or `avx512-vbmi2`.
pub const VARIABLE: &str = "BYTEKILN_SIMD";

/// A set of instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// Whatever the compiler makes for the target without asking: SSE2 on x86-64, NEON on `AArch64`.
    Scalar,
    /// NEON by name, of `AArch64`.
    Neon,
    /// AVX2, FMA, AES, and the counting of bits that came with them (BMI 1 and 2, LZCNT, POPCNT).
    Avx2,
    /// AVX-512 F and BW, and all of the former.
    Avx512,
    /// AVX-512 VBMI 2, which packs bytes, VBMI, which permutes them, VL, for shorter registers, AES of four at a time, and all of the former.
    Avx512Vbmi2,
}

impl Level {
    /// All levels, the least first.
    pub const ALL: [Self; 5] = [Self::Scalar, Self::Neon, Self::Avx2, Self::Avx512, Self::Avx512Vbmi2];

    /// As the environment spells it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Scalar => "scalar",
            Self::Neon => "neon",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Avx512Vbmi2 => "avx512-vbmi2",
        }
    }

    /// Whether this processor has the instructions.
    pub fn is_here(self) -> bool {
        match self {
            Self::Scalar => true,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => {
                is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("fma")
                    && is_x86_feature_detected!("aes")
                    && is_x86_feature_detected!("bmi1")
                    && is_x86_feature_detected!("bmi2")
                    && is_x86_feature_detected!("lzcnt")
                    && is_x86_feature_detected!("popcnt")
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => {
                is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw") && Self::Avx2.is_here()
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Vbmi2 => {
                is_x86_feature_detected!("avx512vbmi2")
                    && is_x86_feature_detected!("avx512vbmi")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("vaes")
                    && Self::Avx512.is_here()
            }
            #[cfg(target_arch = "aarch64")]
            Self::Neon => true,
            #[allow(unreachable_patterns, reason = "which levels are left depends on the target")]
            _ => false,
        }
    }

    /// The level of this process: the one that [`VARIABLE`] names, else the best that the processor has.
    ///
    /// # Errors
    /// The variable names no level, or one that is not here; the text says so.
    pub fn of_process() -> Result<Self, String> {
        static LEVEL: OnceLock<Result<Level, String>> = OnceLock::new();
        LEVEL.get_or_init(|| Self::from_name(env::var(VARIABLE).ok().as_deref())).clone()
    }

    fn from_name(name: Option<&str>) -> Result<Self, String> {
        let here: Vec<Self> = Self::ALL.into_iter().filter(|level| level.is_here()).collect();
        let Some(name) = name.filter(|name| !name.is_empty()) else {
            return Ok(here.last().copied().unwrap_or(Self::Scalar));
        };
        here.iter().copied().find(|level| level.name() == name).ok_or_else(|| {
            let names: Vec<&str> = here.iter().map(|level| level.name()).collect();
            format!("{VARIABLE}: found {name}; expected what this processor has, of {}", names.join(", "))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::{Level, VARIABLE};

    #[test]
    fn a_level_is_found_by_its_name() {
        assert_eq!(Level::from_name(Some("scalar")), Ok(Level::Scalar));
        assert!(Level::from_name(None).unwrap().is_here());
        assert_eq!(Level::from_name(Some("")), Level::from_name(None));
        let error = Level::from_name(Some("mmx")).unwrap_err();
        assert!(error.starts_with(&format!("{VARIABLE}: found mmx; expected ")) && error.contains("scalar"), "{error}");
    }
}
