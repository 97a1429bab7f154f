//! `inception`: features and classes of Inception v3, with weights by a formula.

use repa_tests::inception::weights;
use repa_trainer::evaluate::Inception;
use repa_trainer::images::Image;

use crate::case::{Case, device_for};
use crate::compare::close_relative;

/// Of each array's norm.
const TOLERANCE: f64 = 1e-5;

pub fn check(case: &Case) -> Result<(), String> {
    let inception = Inception::from_weights(weights(), &device_for(3)).map_err(|e| e.to_string())?;
    let features = inception.features(&images(case, "image"));
    let probabilities = inception.probabilities(&case.f32s("pooled"));
    let compare = |what: &str, ours: &[f32]| close_relative(what, ours, &case.f32s(what), TOLERANCE);
    compare("pooled", &features.pooled)?;
    compare("spatial", &features.spatial)?;
    compare("probabilities", &probabilities)
}

/// Images of the case, [N, H, W, 3].
pub fn images(case: &Case, name: &str) -> Vec<Image> {
    let (height, width) = (case.shape(name)[1], case.shape(name)[2]);
    let image = |pixels: &[u8]| Image { width, height, pixels: pixels.to_vec() };
    case.u8s(name).chunks(3 * height * width).map(image).collect()
}
