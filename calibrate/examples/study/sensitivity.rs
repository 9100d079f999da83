//! Which matrices a model is sensitive to, and whether types chosen by sensitivity are better than one type for all.

use std::collections::BTreeMap;
use std::error::Error;
use std::fmt::Write as _;
use std::path::Path;
use std::sync::Arc;

use sluice_format::{NO_LAYER, WeightType};
use sluice_kernels::{Feedback, Kernels, ThreadPool};

use crate::incoherence::{energy, name};
use crate::model::{Model, Number, Packed, WINDOW, built_in, feedback, pack_by, pack_q8, record};
use crate::score::{Score, score, tokens};

/// From few bits to many. While the sensitivity of one group is measured, all other matrices have the last type.
const TYPES: [WeightType; 4] = [WeightType::Q2, WeightType::Q3, WeightType::Q4, WeightType::Q8];

/// Tokens of the built-in text on which sensitivity is measured, different from those of the moments.
const TOKENS: usize = 2 * WINDOW;

/// Number of neighbouring layers whose matrices of one kind have one type.
const BAND: u32 = 3;

/// Most tokens of the text on which mixtures are scored.
const SCORED: usize = 4096;

/// Matrices that have one type: of one kind, with the same inputs, in a few layers.
struct Group {
    label: String,
    matrices: Vec<Number>,
    /// By type, as in [`TYPES`]: square error of the outputs divided by their square.
    errors: [f64; 4],
    /// Divergence when this group alone has the first type.
    divergence: f64,
}

impl Group {
    /// The divergence that is expected if this group alone has a type: proportional to the square error of its outputs.
    fn expected(&self, ty: usize) -> f64 {
        self.divergence * self.errors[ty] / self.errors[0]
    }
}

/// A model in all types.
struct Types {
    model: Model,
    /// By type, as in [`TYPES`].
    packed: BTreeMap<Number, [Packed; 4]>,
    groups: Vec<Group>,
}

/// Measures sensitivities, chooses types for the sizes of uniform types and for sizes in between, and scores all on the text.
/// Recipes are written beside the model.
pub fn run(path: &Path, text: &str) -> Result<(), Box<dyn Error>> {
    let mut types = Types::new(path)?;
    types.measure(path)?;
    let mut ids = tokens(path, text)?;
    ids.truncate(SCORED + 1);
    let reference = score(path, &ids, 512, None)?;
    println!("f32: perplexity {:.4} over {} tokens", reference.perplexity, reference.rows.len());
    let uniform = [0, 1, 2].map(|ty| types.bytes(&vec![ty; types.groups.len()]));
    for (number, ty) in TYPES.iter().enumerate().take(uniform.len()) {
        types.report(path, &ids, &reference, ty.name(), &vec![number; types.groups.len()])?;
    }
    let between = (uniform[0] + uniform[1]) / 2;
    for (label, budget) in [("as q3", uniform[1]), ("between", between), ("as q4", uniform[2])] {
        let chosen = types.choose(budget);
        types.report(path, &ids, &reference, label, &chosen)?;
        std::fs::write(path.with_extension(format!("{}.recipe", label.replace(' ', "-"))), types.recipe(&chosen)?)?;
    }
    Ok(())
}

impl Types {
    fn new(path: &Path) -> Result<Self, Box<dyn Error>> {
        let (kernels, model) = (Kernels::detect()?, Model::open(path)?);
        let pool = ThreadPool::new(std::thread::available_parallelism()?.get());
        let (measured, other) =
            (record(path, &built_in(path, 0)?, |_| true)?, record(path, &built_in(path, 2)?[..TOKENS], |_| true)?);
        let (mut packed, mut groups): (BTreeMap<_, _>, Vec<Group>) = (BTreeMap::new(), Vec::new());
        let mut last: Option<(Arc<Vec<f32>>, Feedback)> = None;
        let mut sums: BTreeMap<String, ([f64; 4], f64)> = BTreeMap::new();
        for number in model.matrices() {
            let (tensor, (_, cols)) = (model.tensor(number), model.shape(number));
            let key = (tensor.layer, name(&tensor.name)?);
            let (inputs, weights) = (&measured[&key], model.weights(number));
            if last.as_ref().is_none_or(|(of, _)| !Arc::ptr_eq(of, inputs)) {
                last = Some((inputs.clone(), feedback(kernels, &pool, inputs, cols).ok_or("nothing was measured")?));
            }
            let feedback = &last.as_ref().expect("it was just made").1;
            let all = TYPES.map(|ty| match ty {
                WeightType::Q8 => pack_q8(&weights, cols),
                _ => pack_by(feedback, ty, &weights, cols),
            });
            let label = label(tensor.layer, &tensor.name);
            let (errors, outputs) = sums.entry(label.clone()).or_default();
            *outputs += energy(kernels, &pool, &weights, &other[&key], cols);
            for (error, packed) in errors.iter_mut().zip(&all) {
                let found = model.unpacked(number, packed.ty, &packed.bytes);
                let difference: Vec<f32> = found.iter().zip(&weights).map(|(a, b)| a - b).collect();
                *error += energy(kernels, &pool, &difference, &other[&key], cols);
            }
            packed.insert(number, all);
            match groups.iter_mut().find(|group| group.label == label) {
                Some(group) => group.matrices.push(number),
                None => groups.push(Group { label, matrices: vec![number], errors: [0.0; 4], divergence: 0.0 }),
            }
        }
        for group in &mut groups {
            let (errors, outputs) = sums[&group.label];
            group.errors = errors.map(|error| error / outputs);
        }
        Ok(Types { model, packed, groups })
    }

    /// The model with each group in the type of this number.
    fn write(&self, path: &Path, chosen: &[usize]) -> Result<(), Box<dyn Error>> {
        let with_types = self.groups.iter().zip(chosen);
        let replaced = with_types.flat_map(|(group, &ty)| group.matrices.iter().map(move |&number| (number, ty)));
        self.model.write(path, &replaced.map(|(number, ty)| (number, &self.packed[&number][ty])).collect())
    }

    /// Bytes of the matrices.
    fn bytes(&self, chosen: &[usize]) -> usize {
        let of_group = |(group, &ty): (&Group, &usize)| -> usize {
            group.matrices.iter().map(|number| self.packed[number][ty].bytes.len()).sum()
        };
        self.groups.iter().zip(chosen).map(of_group).sum()
    }

    fn weights(&self) -> u64 {
        self.packed.keys().map(|&number| self.model.tensor(number).weights()).sum()
    }

    /// Measures the divergence of the model from itself if one group alone has the first type and the others have the last.
    fn measure(&mut self, path: &Path) -> Result<(), Box<dyn Error>> {
        let changed = path.with_extension("changed");
        let (ids, best) = (&built_in(path, 2)?[..TOKENS], TYPES.len() - 1);
        self.write(&changed, &vec![best; self.groups.len()])?;
        let reference = score(&changed, ids, WINDOW, None)?;
        println!("group: divergence in {} alone, square errors of its outputs in percent", TYPES[0]);
        for i in 0..self.groups.len() {
            let mut chosen = vec![best; self.groups.len()];
            chosen[i] = 0;
            self.write(&changed, &chosen)?;
            self.groups[i].divergence = score(&changed, ids, WINDOW, Some(&reference))?.divergence;
            let Group { label, errors, divergence, .. } = &self.groups[i];
            println!("{label}: {divergence:.6} {:.4?}", errors.map(|error| 100.0 * error));
        }
        // Shows whether the costs of the groups alone add up.
        let sum: f64 = self.groups.iter().map(|group| group.divergence).sum();
        self.write(&changed, &vec![0; self.groups.len()])?;
        let all = score(&changed, ids, WINDOW, Some(&reference))?;
        println!("all groups: {:.5}, the sum of each alone {sum:.5}", all.divergence);
        std::fs::remove_file(&changed)?;
        Ok(())
    }

    /// Types for at most this many bytes: starting from the fewest bits, the group that gains most for its bytes is raised by one
    /// type, as long as it fits.
    fn choose(&self, budget: usize) -> Vec<usize> {
        let mut chosen = vec![0; self.groups.len()];
        let bytes = |i: usize, ty: usize| -> usize {
            self.groups[i].matrices.iter().map(|number| self.packed[number][ty].bytes.len()).sum()
        };
        let mut left = budget - self.bytes(&chosen);
        loop {
            let raises = (0..chosen.len()).filter(|&i| chosen[i] + 1 < TYPES.len()).map(|i| {
                let more = bytes(i, chosen[i] + 1) - bytes(i, chosen[i]);
                let gain = self.groups[i].expected(chosen[i]) - self.groups[i].expected(chosen[i] + 1);
                (gain / more as f64, more, i)
            });
            let best = raises.filter(|&(_, more, _)| more <= left).max_by(|a, b| a.0.total_cmp(&b.0));
            let Some((_, more, i)) = best else { return chosen };
            chosen[i] += 1;
            left -= more;
        }
    }

    fn report(
        &self,
        path: &Path,
        ids: &[u32],
        reference: &Score,
        label: &str,
        chosen: &[usize],
    ) -> Result<(), Box<dyn Error>> {
        let changed = path.with_extension("changed");
        self.write(&changed, chosen)?;
        let found = score(&changed, ids, 512, Some(reference))?;
        std::fs::remove_file(&changed)?;
        let bits = 8.0 * self.bytes(chosen) as f64 / self.weights() as f64;
        let expected: f64 = self.groups.iter().zip(chosen).map(|(group, &ty)| group.expected(ty)).sum();
        let count = |ty: usize| chosen.iter().filter(|&&other| other == ty).count();
        println!(
            "{label}: {bits:.3} bits, groups {:?}: perplexity {:.4} ({:+.2} %), divergence {:.5} (expected {expected:.5}), \
             same first choice {:.1} %",
            [0, 1, 2, 3].map(count),
            found.perplexity,
            100.0 * (found.perplexity / reference.perplexity - 1.0),
            found.divergence,
            100.0 * found.agreement
        );
        Ok(())
    }

    fn recipe(&self, chosen: &[usize]) -> Result<String, Box<dyn Error>> {
        let mut text = String::new();
        for (group, &ty) in self.groups.iter().zip(chosen) {
            for tensor in group.matrices.iter().map(|&number| self.model.tensor(number)) {
                let (kind, ty) = (tensor.kind, TYPES[ty]);
                match tensor.layer {
                    // All its parts have one type.
                    NO_LAYER if tensor.index > 0 => (),
                    NO_LAYER => writeln!(text, "{kind} {ty}")?,
                    layer => writeln!(text, "layers.{layer}.{kind}.{} {ty}", tensor.name)?,
                }
            }
        }
        Ok(text)
    }
}

/// The label of a tensor's group.
fn label(layer: u32, name: &str) -> String {
    let kind = if matches!(name, "q" | "k" | "v") { "qkv" } else { name };
    match layer {
        NO_LAYER => kind.to_owned(),
        layer => format!("{}-{}.{kind}", layer / BAND * BAND, layer / BAND * BAND + BAND - 1),
    }
}
