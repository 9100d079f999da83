//! A temperature of attention that falls with the position.

use serde::{Deserialize, Serialize};

use super::check_range;
use crate::limits::MAX_LENGTH;

/// Factor on a query that grows with its position `p` (arXiv:2501.19399, as Llama 4 has it):
/// `1 + slope · ln(1 + floor((p + 1) / step))`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QueryTemperature {
    /// Growth with the logarithm.
    pub slope: f32,
    /// Positions from one value of the factor to the next.
    pub step: usize,
}

impl QueryTemperature {
    /// The factor on the query at `position`.
    pub fn factor(&self, position: usize) -> f32 {
        let steps = (position + 1) / self.step;
        // In f64 until the last operation, so that the platform's logarithm does not affect the result.
        ((steps as f64).ln_1p() * f64::from(self.slope) + 1.0) as f32
    }

    pub(super) fn validate(&self) -> Result<(), String> {
        check_range("temperature.step", self.step, MAX_LENGTH)?;
        if !(self.slope.is_finite() && self.slope >= 0.0) {
            return Err(format!("temperature.slope is {}", self.slope));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::QueryTemperature;

    #[test]
    fn the_factor_changes_once_per_step() {
        let temperature = QueryTemperature { slope: 0.1, step: 8 };
        let factors = [0, 6, 7, 14, 15].map(|position| temperature.factor(position));
        assert_eq!(factors[..2], [1.0, 1.0]);
        assert_eq!(factors[2..4], [(2f64.ln() * f64::from(0.1f32) + 1.0) as f32; 2]);
        assert!(factors[4] > factors[3]);
    }
}
