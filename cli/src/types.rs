//! Checks that requested types would change something, because the user would otherwise find out hours later. `convert` and `plan`
//! share this.

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

/// Whether a plan stores experts, or everything else, at least in part in this type.
pub(crate) fn is_stored(plan: &Plan, experts: bool, ty: WeightType) -> bool {
    let mut groups = plan.types().iter().filter(|(group, _)| is_expert(group) == experts);
    groups.any(|(_, types)| types.iter().any(|t| t == ty.name()))
}

impl Types {
    /// Refuses types that would change nothing in `src`, and returns a remark on a type that has no effect if the other one has.
    /// With a recipe, both types apply only to what no pattern matches, which may be nothing, so nothing is checked.
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
                "--dense-type {ty} would change nothing: of the weights of {src}, only experts can be stored in it"
            )));
        }
        Ok(remark)
    }

    /// The part of [`check`](Self::check) for which a configuration is enough.
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
