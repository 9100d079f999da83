//! Types that a command line asks for, and whether they would change anything: who asks for what would not, would find out hours
//! later. `convert` and `plan` say the same.

use std::path::Path;

use sluice_converter::{Plan, TypeChoice};
use sluice_format::WeightType;

use crate::error::CliError;

/// `--type` and `--dense-type`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Types {
    pub(crate) experts: Option<TypeChoice>,
    pub(crate) dense: Option<TypeChoice>,
}

fn is_expert(group: &str) -> bool {
    group.starts_with("expert.")
}

/// Whether a plan stores experts, or everything else, in a type, of all or in part.
pub(crate) fn is_stored(plan: &Plan, experts: bool, ty: WeightType) -> bool {
    let mut groups = plan.types().iter().filter(|(group, _)| is_expert(group) == experts);
    groups.any(|(_, types)| types.iter().any(|t| t == ty.name()))
}

impl Types {
    /// Refuses types that would change nothing of what `src` is, and returns a remark on one that does not where the other does. With a
    /// recipe, both are for what no pattern matches, which may well be nothing: then there is nothing to check.
    ///
    /// # Errors
    /// Usage.
    pub(crate) fn check(self, src: &Path, plan: &Plan) -> Result<Option<String>, CliError> {
        let has_experts = plan.types().keys().any(|group| is_expert(group));
        let remark = self.check_experts(src, has_experts)?;
        let src = src.display();
        if let Some(TypeChoice::Type(ty)) = self.experts
            && has_experts
            && !is_stored(plan, true, ty)
        {
            return Err(CliError::Usage(format!(
                "--type {ty} would change nothing: none of the experts of {src} can be stored so. `sluice convert --dry-run` without \
                 it says what they would be"
            )));
        }
        if let Some(TypeChoice::Type(ty)) = self.dense
            && !is_stored(plan, false, ty)
        {
            return Err(CliError::Usage(format!(
                "--dense-type {ty} would change nothing: none of the weights of {src} but experts can be stored so"
            )));
        }
        Ok(remark)
    }

    /// The part of [`check`](Self::check) that a configuration says.
    ///
    /// # Errors
    /// Usage.
    pub(crate) fn check_experts(self, src: &Path, has_experts: bool) -> Result<Option<String>, CliError> {
        let Some(TypeChoice::Type(ty)) = self.experts.filter(|_| !has_experts) else { return Ok(None) };
        let src = src.display();
        if self.dense.is_none() {
            return Err(CliError::Usage(format!(
                "--type {ty} would change nothing: it is for routed experts, and {src} has none. --dense-type {ty} is for \
                 all other weights"
            )));
        }
        Ok(Some(format!("--type {ty} changes nothing: it is for routed experts, and {src} has none")))
    }
}
