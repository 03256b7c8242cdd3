// One frame from memory, in Rust, over the C interface:
//     rustc frame.rs -L PREFIX/lib -C link-arg=-Wl,-rpath,PREFIX/lib
use std::{env, ffi::{c_char, c_void, CStr, CString}, mem::size_of, ptr::{null, null_mut}};

#[repr(C)] struct Image { data: *const u8, width: usize, height: usize, stride: usize, order: i32, reserved: i32 }
// as much of the struct as is used here: `size` says so
#[repr(C)] struct Prediction { size: usize, label: *const c_char, index: usize, probability: f32, uncertainty: f32 }

#[link(name = "invariclip_c")]
extern "C" {
    fn invariclip_last_error() -> *const c_char;
    fn invariclip_model_load(path: *const c_char, options: *const c_void, model: *mut *mut c_void) -> i32;
    fn invariclip_classify(
        model: *const c_void, images: *const Image, count: usize, options: *const c_void, to: *mut *mut c_void,
    ) -> i32;
    fn invariclip_predictions_get(predictions: *const c_void, place: usize, prediction: *mut Prediction) -> i32;
    fn invariclip_predictions_free(predictions: *mut c_void);
    fn invariclip_model_free(model: *mut c_void);
}

fn main() {
    let path = CString::new(env::args().nth(1).expect("usage: frame ARTIFACT")).unwrap();
    let frame = vec![127u8; 480 * 640 * 3];
    let image = Image { data: frame.as_ptr(), width: 640, height: 480, stride: 0, order: 2, reserved: 0 };
    let (mut model, mut predictions) = (null_mut(), null_mut());
    let size = size_of::<Prediction>();
    let mut best = Prediction { size, label: null(), index: 0, probability: 0.0, uncertainty: 0.0 };
    unsafe {
        let done = invariclip_model_load(path.as_ptr(), null(), &mut model) == 0
            && invariclip_classify(model, &image, 1, null(), &mut predictions) == 0
            && invariclip_predictions_get(predictions, 0, &mut best) == 0;
        if !done {
            eprintln!("{}", CStr::from_ptr(invariclip_last_error()).to_str().unwrap());
            std::process::exit(2);
        }
        let label = if best.label.is_null() { "not sure" } else { CStr::from_ptr(best.label).to_str().unwrap() };
        println!("{} {}", label, best.probability);
        invariclip_predictions_free(predictions);
        invariclip_model_free(model);
    }
}
