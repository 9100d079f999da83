//! Slots of several sizes, so that experts of a model with weights of mixed types take the memory that they need and no more.
//!
//! A *size class* is the slots of one size, and the layers whose experts go into them: into the smallest in which all experts of the layer
//! fit. The sizes and their slots are decided when the model is opened ([`SlotPlan::new`]), so slots keep their addresses, and the memory
//! can stay registered with the kernel. Among the layers of a class slots go to whichever expert is wanted; between classes the memory
//! is divided once, such that each holds the same part of its experts. That is the division with the fewest bytes to read if the layers
//! route alike: what a byte of memory saves is the probability that its expert is used, whatever the size of the expert.

use std::cmp::Reverse;

/// The least number of slots of a class while it is in use: one expert is computed while another is read.
pub const LEAST_SLOTS: usize = 2;

/// Most size classes: with more, each would have few slots.
const MOST: usize = 8;

/// Slots that are larger than their experts by less than this part of all slots are not worth a class.
const WASTE: u64 = 32;

/// Slots that a class has at least: fewer could not hold what is in flight, which includes 16 prefetches.
const IN_FLIGHT: usize = 32;

/// Steps in which the part of the experts that is held is measured.
const STEPS: u64 = 1 << 24;

/// The slots of one size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlotClass {
    /// Bytes of a slot, a multiple of the page size.
    pub len: u64,
    /// Slots.
    pub slots: usize,
    /// Experts that go into them.
    pub experts: usize,
}

impl SlotClass {
    fn bytes(&self) -> u64 {
        self.len.saturating_mul(self.slots as u64)
    }

    fn least(&self) -> usize {
        self.slots.min(LEAST_SLOTS)
    }
}

/// One layer with routed experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerSize {
    /// Bytes of its largest expert in memory.
    pub len: u64,
    /// Its experts.
    pub experts: usize,
    /// How many of them a token uses.
    pub top_k: usize,
}

/// How many slots there are of which size; sizes ascend.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SlotPlan {
    classes: Vec<SlotClass>,
}

/// A class that is being planned.
#[derive(Clone, Copy)]
struct Draft {
    len: u64,
    experts: usize,
    /// Experts that a token uses.
    cycle: usize,
    /// Most experts that a token uses in one layer.
    top_k: usize,
    /// Bytes of all its experts.
    bytes: u64,
}

impl Draft {
    /// Bytes by which slots for all experts are larger than the experts.
    fn waste(&self) -> u64 {
        self.len.saturating_mul(self.experts as u64).saturating_sub(self.bytes)
    }

    fn with(&self, larger: &Draft) -> Draft {
        Draft {
            len: larger.len,
            experts: self.experts + larger.experts,
            cycle: self.cycle + larger.cycle,
            top_k: self.top_k.max(larger.top_k),
            bytes: self.bytes.saturating_add(larger.bytes),
        }
    }

    /// Slots that it has at least, if there is more than one class. A cache much smaller than a token cycle does best with
    /// the experts of few layers, of whichever the policy prefers, so it must not be divided.
    fn least(&self) -> usize {
        (2 * self.top_k).max(IN_FLIGHT).max(self.cycle / 4 * 3).min(self.experts)
    }

    fn least_bytes(&self) -> u64 {
        self.len.saturating_mul(self.least() as u64)
    }
}

impl SlotPlan {
    /// Slots for the experts of these layers, in at most `bytes` bytes, and at most one for each expert. The fewer bytes there are, the
    /// fewer sizes: at the end there is only the largest. A plan without slots means that not even one expert fits.
    #[must_use]
    pub fn new(layers: impl IntoIterator<Item = LayerSize>, bytes: u64) -> SlotPlan {
        let layers = layers.into_iter().filter(|layer| layer.experts > 0);
        let mut drafts: Vec<Draft> = layers
            .map(|LayerSize { len, experts, top_k }| Draft {
                len,
                experts,
                cycle: top_k,
                top_k,
                bytes: len.saturating_mul(experts as u64),
            })
            .collect();
        drafts.sort_by_key(|draft| draft.len);
        drafts.dedup_by(|larger, smaller| {
            let same = larger.len == smaller.len;
            if same {
                *smaller = smaller.with(larger);
            }
            same
        });
        merge(&mut drafts, bytes);
        let mut plan = SlotPlan {
            classes: drafts.iter().map(|d| SlotClass { len: d.len, slots: d.experts, experts: d.experts }).collect(),
        };
        let least: Vec<usize> =
            if drafts.len() > 1 { drafts.iter().map(Draft::least).collect() } else { vec![0; drafts.len()] };
        plan.shrink(bytes, &least);
        plan
    }

    /// Slots of one size.
    #[must_use]
    pub fn uniform(len: u64, slots: usize, experts: usize) -> SlotPlan {
        SlotPlan { classes: vec![SlotClass { len, slots: slots.min(experts), experts }; usize::from(experts > 0)] }
    }

    /// The sizes, ascending.
    #[must_use]
    pub fn classes(&self) -> &[SlotClass] {
        &self.classes
    }

    /// The number of slots of each size, ascending by size.
    #[must_use]
    pub fn counts(&self) -> Vec<usize> {
        self.classes.iter().map(|class| class.slots).collect()
    }

    /// The same sizes with other numbers of slots.
    #[must_use]
    pub fn with_counts(&self, counts: impl IntoIterator<Item = usize>) -> SlotPlan {
        let with = |(class, slots): (&SlotClass, usize)| SlotClass { slots, ..*class };
        SlotPlan { classes: self.classes.iter().zip(counts).map(with).collect() }
    }

    /// Slots of all sizes.
    #[must_use]
    pub fn slots(&self) -> usize {
        self.classes.iter().map(|class| class.slots).sum()
    }

    /// Bytes of all slots.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.classes.iter().fold(0, |sum, class| sum.saturating_add(class.bytes()))
    }

    /// Bytes to which the plan can shrink: [`LEAST_SLOTS`] slots of each size.
    #[must_use]
    pub fn least_bytes(&self) -> u64 {
        self.classes.iter().map(|class| class.least() as u64 * class.len).sum()
    }

    /// The same sizes in at most `bytes` bytes, with at most as many slots of each, and at least `least` or as many as there are, if these are
    /// fewer; `None` if `bytes` does not suffice.
    #[must_use]
    pub fn within(&self, bytes: u64, least: usize) -> Option<SlotPlan> {
        let mut plan = self.clone();
        let least: Vec<usize> = self.classes.iter().map(|class| class.slots.min(least)).collect();
        plan.shrink(bytes, &least);
        (plan.bytes() <= bytes).then_some(plan)
    }

    /// Lowers the slots of each class to the same part of what they are, but to not less than `least`, so that all together take at most
    /// `bytes` bytes if `least` allows that. What is then left is given to the largest class that it holds a slot of, and so on.
    fn shrink(&mut self, bytes: u64, least: &[usize]) {
        let most = self.counts();
        let part = |steps: u64| {
            let part = most.iter().zip(least).map(|(&most, &least)| {
                let slots = (most as u128 * u128::from(steps) / u128::from(STEPS)) as usize;
                slots.max(least)
            });
            self.with_counts(part)
        };
        // The largest number of steps that fits.
        let (mut fits, mut exceeds) = (0, STEPS + 1);
        while exceeds - fits > 1 {
            let middle = fits.midpoint(exceeds);
            if part(middle).bytes() <= bytes { fits = middle } else { exceeds = middle }
        }
        let mut plan = part(fits);
        let mut left = bytes.saturating_sub(plan.bytes());
        for (class, &most) in plan.classes.iter_mut().zip(&most).rev() {
            let more = left.checked_div(class.len).unwrap_or(0).min((most - class.slots) as u64);
            class.slots += more as usize;
            left -= more * class.len;
        }
        *self = plan;
    }
}

/// Merges classes with the next larger ones until there are few, each is worth its slots, and `bytes` bytes hold what they need.
fn merge(drafts: &mut Vec<Draft>, bytes: u64) {
    let all: u64 = drafts.iter().fold(0, |sum, draft| sum.saturating_add(draft.bytes));
    while drafts.len() > 1 {
        let apart = |i: usize| drafts[i].waste().saturating_add(drafts[i + 1].waste());
        let added = |i: usize| drafts[i].with(&drafts[i + 1]).waste().saturating_sub(apart(i));
        let (waste, at) = (0..drafts.len() - 1)
            .map(|i| (added(i), Reverse(i)))
            .min()
            .map(|(w, Reverse(i))| (w, i))
            .unwrap_or_default();
        let wasted = drafts.iter().fold(0u64, |sum, draft| sum.saturating_add(draft.waste()));
        let least = drafts.iter().fold(0u64, |sum, draft| sum.saturating_add(draft.least_bytes()));
        if drafts.len() <= MOST && wasted.saturating_add(waste) > all / WASTE && least <= bytes {
            return;
        }
        let merged = drafts[at].with(&drafts[at + 1]);
        drafts.splice(at..at + 2, [merged]);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn layers() -> impl Strategy<Value = Vec<LayerSize>> {
        let layer = (1u64..40, 1usize..300, 1usize..16).prop_map(|(pages, experts, top_k)| LayerSize {
            len: pages * 4096,
            experts,
            top_k: top_k.min(experts),
        });
        proptest::collection::vec(layer, 1..50)
    }

    proptest! {
        /// Whatever the sizes: within the bytes, full as far as experts are left, and every expert has a slot to go to.
        #[test]
        fn plans_are_within_their_bytes_and_full(layers in layers(), part in 0.0..1.2f64, less in 0.0..1.0f64) {
            let all: u64 = layers.iter().map(|layer| layer.len * layer.experts as u64).sum();
            let bytes = (all as f64 * part) as u64;
            let plan = SlotPlan::new(layers.iter().copied(), bytes);
            prop_assert!(plan.bytes() <= bytes);
            prop_assert!(plan.classes().len() <= MOST && plan.classes().is_sorted_by(|a, b| a.len < b.len));
            let largest = layers.iter().map(|layer| layer.len).max().unwrap();
            prop_assert_eq!(plan.classes().last().map(|class| class.len), Some(largest));
            let experts: usize = layers.iter().map(|layer| layer.experts).sum();
            prop_assert_eq!(plan.classes().iter().map(|class| class.experts).sum::<usize>(), experts);
            // What is left holds no slot of any size that is not complete.
            let left = bytes - plan.bytes();
            prop_assert!(plan.classes().iter().all(|class| class.slots == class.experts || left < class.len));
            if plan.classes().len() > 1 {
                prop_assert!(plan.classes().iter().all(|class| class.slots >= IN_FLIGHT.min(class.experts)));
            }
            let least = plan.least_bytes();
            let to = least + ((plan.bytes() - least) as f64 * less) as u64;
            let smaller = plan.within(to, LEAST_SLOTS).expect("at least the least");
            prop_assert!(smaller.bytes() <= to);
            prop_assert!(smaller.classes().iter().zip(plan.classes()).all(|(a, b)| a.slots <= b.slots && a.slots >= b.least()));
            prop_assert_eq!(plan.within(plan.bytes(), LEAST_SLOTS), Some(plan.clone()));
            prop_assert!(least == 0 || plan.within(least - 1, LEAST_SLOTS).is_none());
        }
    }

    fn layer(pages: u64, experts: usize, top_k: usize) -> LayerSize {
        LayerSize { len: pages * 4096, experts, top_k }
    }

    #[test]
    fn one_size_is_as_many_slots_as_fit() {
        let layers = [layer(3, 64, 8); 16];
        for bytes in [0, 4096, 3 * 4096, 1000 * 4096, u64::MAX] {
            let slots = (bytes / (3 * 4096)).min(64 * 16) as usize;
            assert_eq!(SlotPlan::new(layers, bytes), SlotPlan::uniform(3 * 4096, slots, 64 * 16));
        }
    }

    #[test]
    fn sizes_hold_the_same_part_of_their_experts() {
        let layers = [[layer(100, 128, 8); 36], [layer(150, 128, 8); 36]].concat();
        let all = 128 * 36 * 250 * 4096;
        let plan = SlotPlan::new(layers, all / 5);
        let parts: Vec<f64> = plan.classes().iter().map(|class| class.slots as f64 / class.experts as f64).collect();
        assert!(parts.len() == 2 && parts.iter().all(|part| (part - 0.2).abs() < 0.001), "{parts:?}");
        assert!(all / 5 - plan.bytes() < 100 * 4096);
    }

    #[test]
    fn a_small_cache_is_not_divided() {
        let layers = [[layer(100, 128, 8); 36], [layer(150, 128, 8); 36]].concat();
        // A token uses 576 experts.
        let plan = SlotPlan::new(layers, 300 * 150 * 4096);
        assert_eq!(plan.counts(), [300]);
        assert_eq!(plan.classes()[0].len, 150 * 4096);
    }

    #[test]
    fn sizes_that_hardly_differ_share_slots() {
        let layers = [layer(100, 128, 8), layer(101, 128, 8), layer(102, 128, 8)];
        assert_eq!(SlotPlan::new(layers, u64::MAX).counts(), [3 * 128]);
    }

    #[test]
    fn nothing_is_planned_for_a_model_without_experts() {
        let plan = SlotPlan::new([], 1 << 30);
        assert_eq!((plan.slots(), plan.bytes(), plan.least_bytes()), (0, 0, 0));
        assert_eq!(plan.within(0, LEAST_SLOTS), Some(plan));
    }
}
