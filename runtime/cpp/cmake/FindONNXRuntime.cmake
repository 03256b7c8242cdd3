# Finds ONNX Runtime's C++ API: in ONNXRUNTIME_ROOT (a release's folder with include/ and lib/) and nowhere else where that
# is given, else in the system's folders. A folder that is named is looked at in a cross build too, whose toolchain file
# turns every search towards the target's root.
if(NOT ONNXRUNTIME_ROOT AND DEFINED ENV{ONNXRUNTIME_ROOT})
  set(ONNXRUNTIME_ROOT "$ENV{ONNXRUNTIME_ROOT}")
endif()
set(ONNXRuntime_places)
if(ONNXRUNTIME_ROOT)
  set(ONNXRuntime_places PATHS "${ONNXRUNTIME_ROOT}" NO_DEFAULT_PATH CMAKE_FIND_ROOT_PATH_BOTH)
endif()
find_path(ONNXRuntime_INCLUDE_DIR onnxruntime_cxx_api.h ${ONNXRuntime_places}
  PATH_SUFFIXES include include/onnxruntime include/onnxruntime/core/session onnxruntime)
find_library(ONNXRuntime_LIBRARY onnxruntime ${ONNXRuntime_places} PATH_SUFFIXES lib lib64)
unset(ONNXRuntime_places)
include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(ONNXRuntime REQUIRED_VARS ONNXRuntime_LIBRARY ONNXRuntime_INCLUDE_DIR)
if(ONNXRuntime_FOUND AND NOT TARGET ONNXRuntime::ONNXRuntime)
  add_library(ONNXRuntime::ONNXRuntime UNKNOWN IMPORTED)
  set_target_properties(ONNXRuntime::ONNXRuntime PROPERTIES
    IMPORTED_LOCATION "${ONNXRuntime_LIBRARY}" INTERFACE_INCLUDE_DIRECTORIES "${ONNXRuntime_INCLUDE_DIR}")
endif()
mark_as_advanced(ONNXRuntime_INCLUDE_DIR ONNXRuntime_LIBRARY)
