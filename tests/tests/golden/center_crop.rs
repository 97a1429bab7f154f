//! ADM's centre crop: equal to Pillow's to the byte or, on under 0.1% of the values, within one level.

use repa_trainer::images::{Image, center_crop};

use crate::case::Case;

/// Checks one case.
pub fn check(case: &Case) -> Result<(), String> {
    let &[height, width, 3] = case.shape("image") else { return Err("image is not [H, W, 3]".into()) };
    let image = Image { width, height, pixels: case.u8s("image").to_vec() };
    let size = case.usize("size", 256);
    let cropped = center_crop(&image, size);
    let expected = case.u8s("cropped");
    if cropped.pixels.len() != expected.len() {
        return Err(format!("{} bytes where Pillow has {}", cropped.pixels.len(), expected.len()));
    }
    let differences: Vec<u8> =
        cropped.pixels.iter().zip(expected).map(|(a, b)| a.abs_diff(*b)).filter(|&d| d > 0).collect();
    let largest = differences.iter().max().copied().unwrap_or(0);
    if largest > 1 || differences.len() * 1000 >= expected.len() {
        return Err(format!(
            "{} of {} values differ, by up to {largest} levels",
            differences.len(),
            expected.len()
        ));
    }
    Ok(())
}
