//! Which experts are in memory.

use serde::{Serialize, Serializer};

use super::Engine;

/// The experts of one layer, and which of them are in memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct LayerExperts {
    /// Number of the layer in the model, counted from 0 over all layers.
    pub layer: usize,
    /// Number of its experts.
    pub experts: usize,
    /// Whether each of them is in memory. Serialised as hexadecimal digits of four experts each; the first of the four is the
    /// highest bit, and experts that the layer does not have are 0.
    #[serde(serialize_with = "as_hex")]
    pub resident: Vec<bool>,
}

impl LayerExperts {
    /// How many of them are in memory.
    pub fn count(&self) -> usize {
        self.resident.iter().filter(|resident| **resident).count()
    }
}

fn as_hex<S: Serializer>(resident: &[bool], serializer: S) -> Result<S::Ok, S::Error> {
    let bit = |four: &[bool], place: usize| u32::from(four.get(place).copied().unwrap_or(false)) << (3 - place);
    let digit = |four: &[bool]| (0..4).map(|place| bit(four, place)).sum();
    let digits = resident.chunks(4).map(|four| char::from_digit(digit(four), 16).expect("four bits are one digit"));
    serializer.serialize_str(&digits.collect::<String>())
}

impl Engine {
    /// Which experts are in memory now, for each layer that has experts, in order. Takes a few microseconds for each thousand
    /// experts in memory.
    pub fn residency(&self) -> Vec<LayerExperts> {
        let layers = self.model.spec().layers.iter().enumerate();
        let with_experts = layers.filter_map(|(layer, spec)| Some((layer, spec.ffn.moe.as_ref()?.experts)));
        let mut layers: Vec<LayerExperts> = with_experts
            .map(|(layer, experts)| LayerExperts { layer, experts, resident: vec![false; experts] })
            .collect();
        for key in self.storage.pool.residents() {
            let place = layers.binary_search_by_key(&(key.layer as usize), |of| of.layer);
            if let Some(resident) = place.ok().and_then(|place| layers[place].resident.get_mut(key.expert as usize)) {
                *resident = true;
            }
        }
        layers
    }
}

#[cfg(test)]
mod tests {
    use super::as_hex;

    #[test]
    fn four_experts_are_a_digit() {
        let hex = |bits: &str| {
            let bits: Vec<bool> = bits.chars().map(|c| c == '1').collect();
            let mut out = Vec::new();
            as_hex(&bits, &mut serde_json::Serializer::new(&mut out)).unwrap();
            String::from_utf8(out).unwrap()
        };
        assert_eq!(hex(""), "\"\"");
        assert_eq!(hex("1000"), "\"8\"");
        assert_eq!(hex("000110101"), "\"1a8\"");
    }
}
