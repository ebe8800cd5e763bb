package upload

import (
	"strings"
	"unicode/utf8"
)

// ErrKey's reasons; what S3, MinIO's disk layout and directories have in common.
const (
	maxKey     = 1024
	maxSegment = 255
)

// CheckKey says whether key can be stored everywhere: 1-1024 bytes of UTF-8
// without NUL, in segments of 1-255 bytes, none of them "." or "..". The error
// is [ErrKey] with the reason.
func CheckKey(key string) error {
	why := ""
	switch {
	case key == "":
		why = "it is empty"
	case len(key) > maxKey:
		why = "it has more than 1024 bytes"
	case !utf8.ValidString(key):
		why = "it is not UTF-8"
	case strings.IndexByte(key, 0) >= 0:
		why = "it has a zero byte"
	default:
		for seg := range strings.SplitSeq(key, "/") {
			switch {
			case seg == "":
				why = "it has an empty segment"
			case seg == "." || seg == "..":
				why = "it has a segment " + seg
			case len(seg) > maxSegment:
				why = "it has a segment of more than 255 bytes"
			case strings.HasPrefix(seg, tempPrefix):
				why = "names that begin with " + tempPrefix + " are reserved"
			}
		}
	}
	if why == "" {
		return nil
	}
	return &keyError{key, why}
}

type keyError struct{ key, why string }

func (e *keyError) Error() string { return ErrKey.Error() + ": " + e.why }
func (e *keyError) Unwrap() error { return ErrKey }

// keyErr is CheckKey's error dressed for an operation, or nil.
func keyErr(op, store, key string) error {
	if err := CheckKey(key); err != nil {
		return newError(op, store, key, nil, err)
	}
	return nil
}
