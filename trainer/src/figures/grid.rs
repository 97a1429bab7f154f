//! Images in labelled rows.

use image::imageops::{self, FilterType};
use image::{Rgb, RgbImage};

use super::{FigureError, text};
use crate::images::Image;

const MARGIN: usize = 28;
const GAP: usize = 8;
const TITLE_SIZE: f64 = 28.0;
const TITLE_HEIGHT: usize = 52;
const FRAME: Rgb<u8> = Rgb([226, 229, 234]);

/// Small images are enlarged to about this many pixels.
const WANTED_CELL: usize = 112;

/// A row of a grid.
#[derive(Debug, Clone)]
pub struct GridRow {
    /// What its images are.
    pub label: String,
    /// Its images, from the left; rows may be of different lengths.
    pub images: Vec<Image>,
}

/// A picture of rows of images, each row with its label on the left, under a title (if it is not
/// empty). All images are of one size; those below 112 pixels are enlarged by a whole factor.
///
/// # Errors
/// [`FigureError::Images`] where there are no images, or not of one size.
pub fn labelled_grid(rows: &[GridRow], title: &str) -> Result<Image, FigureError> {
    let Some(first) = rows.iter().flat_map(|row| &row.images).next() else {
        return Err(FigureError::Images("there are none".to_owned()));
    };
    let sizes_differ = |i: &&Image| (i.width, i.height) != (first.width, first.height);
    if let Some(other) = rows.iter().flat_map(|row| &row.images).find(sizes_differ) {
        return Err(FigureError::Images(format!(
            "sizes differ: {} x {} and {} x {}",
            first.width, first.height, other.width, other.height
        )));
    }
    let columns = rows.iter().map(|row| row.images.len()).max().unwrap_or(0);
    let factor = WANTED_CELL.div_ceil(first.width.max(first.height).max(1));
    let (cell_width, cell_height) = (first.width * factor, first.height * factor);
    let label_size = (cell_height as f64 * 0.17).clamp(13.0, 22.0);
    let mut label_width = 0;
    for row in rows {
        label_width = label_width.max(text::width(&row.label, label_size)?);
    }
    let left = MARGIN + if label_width > 0 { label_width + 2 * GAP } else { 0 };
    let top = if title.is_empty() { MARGIN } else { MARGIN / 2 + TITLE_HEIGHT };
    let right = (left + columns * (cell_width + GAP)).max(MARGIN + text::width(title, TITLE_SIZE)? + GAP);
    let (width, height) = (right - GAP + MARGIN, top + rows.len() * (cell_height + GAP) - GAP + MARGIN);

    let mut canvas = RgbImage::from_pixel(width as u32, height as u32, Rgb([255; 3]));
    text::draw(&mut canvas, title, MARGIN, MARGIN / 2 + TITLE_HEIGHT / 2, TITLE_SIZE)?;
    for (number, GridRow { label, images }) in rows.iter().enumerate() {
        let y = top + number * (cell_height + GAP);
        let x = left - 2 * GAP - text::width(label, label_size)?.min(left - 2 * GAP);
        text::draw(&mut canvas, label, x, y + cell_height / 2, label_size)?;
        for (column, image) in images.iter().enumerate() {
            let x = left + column * (cell_width + GAP);
            let cell = enlarged(image, cell_width, cell_height)?;
            frame(&mut canvas, x, y, cell_width, cell_height);
            imageops::replace(&mut canvas, &cell, x as i64, y as i64);
        }
    }
    Ok(Image { width, height, pixels: canvas.into_raw() })
}

fn enlarged(image: &Image, width: usize, height: usize) -> Result<RgbImage, FigureError> {
    let (from_width, from_height) = (image.width as u32, image.height as u32);
    let image = RgbImage::from_raw(from_width, from_height, image.pixels.clone())
        .ok_or_else(|| FigureError::Images("one has fewer pixels than its size".to_owned()))?;
    if (from_width as usize, from_height as usize) == (width, height) {
        return Ok(image);
    }
    Ok(imageops::resize(&image, width as u32, height as u32, FilterType::CatmullRom))
}

/// One pixel around a cell, so that white images have an edge.
fn frame(canvas: &mut RgbImage, x: usize, y: usize, width: usize, height: usize) {
    for row in y - 1..=y + height {
        for column in x - 1..=x + width {
            canvas.put_pixel(column as u32, row as u32, FRAME);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plain(value: u8) -> Image {
        Image { width: 64, height: 64, pixels: vec![value; 64 * 64 * 3] }
    }

    fn row(label: &str, values: &[u8]) -> GridRow {
        GridRow { label: label.to_owned(), images: values.iter().map(|&v| plain(v)).collect() }
    }

    #[test]
    fn cells_lie_in_rows_beside_their_labels() {
        let values = [[0, 40, 80], [120, 160, 200]];
        let rows = [row("one", &values[0]), row("two", &values[1])];
        let grid = labelled_grid(&rows, "Title").expect("a grid");
        let canvas = RgbImage::from_raw(grid.width as u32, grid.height as u32, grid.pixels).expect("whole");
        let centre = |row: usize, column: usize| {
            let x = grid.width - MARGIN - (3 - column) * (128 + GAP) + GAP + 64;
            let y = grid.height - MARGIN - (2 - row) * (128 + GAP) + GAP + 64;
            canvas.get_pixel(x as u32, y as u32).0[0]
        };
        for (number, value) in values.iter().flatten().enumerate() {
            assert_eq!(centre(number / 3, number % 3), *value);
        }
        // Ink of the title and of both labels, left of the images.
        let left = (grid.width - MARGIN - 3 * (128 + GAP)) as u32;
        let inked = |from: usize, to: usize| {
            (from as u32..to as u32).any(|y| (0..left).any(|x| canvas.get_pixel(x, y).0[0] < 100))
        };
        let rows = grid.height - MARGIN - 2 * (128 + GAP);
        assert!(inked(0, rows) && inked(rows, rows + 128) && inked(rows + 136, grid.height));
    }

    #[test]
    fn rows_may_differ_in_length_and_images_not_in_size() {
        let long = labelled_grid(&[row("a", &[1, 2]), row("b", &[3])], "").expect("a grid");
        let square = labelled_grid(&[row("a", &[1, 2]), row("b", &[3, 4])], "").expect("a grid");
        assert_eq!((long.width, long.height), (square.width, square.height));
        assert!(labelled_grid(&[], "").is_err());
        let other = Image { width: 32, height: 64, pixels: vec![0; 32 * 64 * 3] };
        let mixed = GridRow { label: String::new(), images: vec![plain(0), other] };
        let error = labelled_grid(&[mixed], "").expect_err("two sizes");
        assert!(error.to_string().contains("64 x 64 and 32 x 64"), "{error}");
    }
}
