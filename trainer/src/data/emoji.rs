//! The quickstart's images: Twemoji (72 x 72 PNG, from the `twemoji-assets` crate; artwork CC-BY 4.0)
//! with the Unicode group of each (from the `emojis` crate) as its class.

use image::imageops::FilterType;
use image::{Rgb, RgbImage};
use twemoji_assets::png::PngTwemojiAsset;

use crate::images::Image;

/// Class names, by label.
pub const CLASSES: [&str; 9] =
    ["smileys", "people", "animals", "food", "travel", "activities", "objects", "symbols", "flags"];

/// Width and height of the quickstart's images.
pub const RESOLUTION: usize = 64;

/// One labelled emoji, in the default skin tone.
#[derive(Debug, Clone, Copy)]
pub struct Emoji {
    /// The emoji itself.
    pub text: &'static str,
    /// Its Unicode name.
    pub name: &'static str,
    /// Index into [`CLASSES`].
    pub label: usize,
    png: &'static [u8],
}

/// Every emoji that Twemoji draws, in Unicode's order. The order never changes with the machine.
pub fn all() -> Vec<Emoji> {
    emojis::iter()
        .filter_map(|emoji| {
            let asset: &PngTwemojiAsset = PngTwemojiAsset::from_emoji(emoji.as_str())?;
            Some(Emoji {
                text: emoji.as_str(),
                name: emoji.name(),
                label: emoji.group() as usize,
                png: asset,
            })
        })
        .collect()
}

/// Whether an emoji is kept out of the training of the quickstart's own autoencoder and teacher:
/// one in ten, by its name, so that variants of a base emoji ("man: ...", "woman: ...") go together.
pub fn held_out(emoji: &Emoji) -> bool {
    xxhash_rust::xxh3::xxh3_64(base_name(emoji.name).as_bytes()).is_multiple_of(10)
}

/// The name without its variant: "woman running facing right" and "man running" share "running".
fn base_name(name: &str) -> String {
    let name = name.split(':').next().unwrap_or(name);
    name.split(' ')
        .filter(|w| {
            !matches!(*w, "man" | "woman" | "men" | "women" | "person" | "people" | "facing" | "right")
        })
        .collect::<Vec<_>>()
        .join(" ")
}

impl Emoji {
    /// The drawing on white, [`RESOLUTION`] pixels square.
    pub fn image(&self) -> Image {
        let decoded = image::load_from_memory_with_format(self.png, image::ImageFormat::Png)
            .expect("the crate's own PNG decodes")
            .to_rgba8();
        let mut opaque = RgbImage::new(decoded.width(), decoded.height());
        for (to, from) in opaque.pixels_mut().zip(decoded.pixels()) {
            let [r, g, b, a] = from.0.map(u32::from);
            let on_white = |c: u32| ((c * a + 255 * (255 - a) + 127) / 255) as u8;
            *to = Rgb([on_white(r), on_white(g), on_white(b)]);
        }
        let size = RESOLUTION as u32;
        let resized = image::imageops::resize(&opaque, size, size, FilterType::CatmullRom);
        Image { width: RESOLUTION, height: RESOLUTION, pixels: resized.into_raw() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_class_has_images_and_a_tenth_is_held_out() {
        let all = all();
        assert!(all.len() > 1500, "{} emojis", all.len());
        for label in 0..CLASSES.len() {
            assert!(all.iter().filter(|e| e.label == label).count() > 50, "class {label}");
        }
        let held_out = all.iter().filter(|e| held_out(e)).count();
        assert!((all.len() / 20..all.len() / 5).contains(&held_out), "{held_out} of {}", all.len());
    }

    #[test]
    fn variants_of_one_emoji_are_held_out_together() {
        assert_eq!(base_name("man running facing right"), base_name("woman running"));
        assert_eq!(base_name("family: man, woman, boy"), base_name("family: woman, girl"));
    }

    #[test]
    fn the_corners_of_a_face_are_white() {
        let face = all().into_iter().find(|e| e.text == "😀").expect("a face").image();
        assert_eq!(&face.pixels[..3], &[255, 255, 255]);
        let middle = (32 * RESOLUTION + 32) * 3;
        assert!(face.pixels[middle] > 200 && face.pixels[middle + 2] < 150, "a yellow face");
    }
}
