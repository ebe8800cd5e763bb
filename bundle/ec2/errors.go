package ec2

import (
	"errors"
	"fmt"
)

// Classes of error: what is wrong with a bundle, for callers that branch.
// Every error of this package about a bundle is an [*Error] that wraps one.
var (
	ErrFormat    = errors.New("malformed")             // breaks the format's rules
	ErrTruncated = errors.New("truncated")             // ends too early
	ErrTooNew    = errors.New("too new a version")     // of the manifest
	ErrTooOld    = errors.New("too old a version")     // of the manifest
	ErrEncrypted = errors.New("encrypted manifest")    // open it with DecryptManifest first
	ErrSignature = errors.New("signature not valid")   // missing, or made by no key that is trusted
	ErrUnsigned  = errors.New("not signed")            // says UNSIGNED and the caller did not allow that
	ErrDigest    = errors.New("digest differs")        // of a part or of the archive within
	ErrSize      = errors.New("size differs")          // from what the manifest declares
	ErrKey       = errors.New("wrong private key")     // it does not open this bundle
	ErrLimit     = errors.New("limit exceeded")        // more than declared, or than any sane bundle has
	ErrOption    = errors.New("invalid bundle option") // what the caller asks for cannot be written
)

// Error says what is wrong (Class, one of the Err… values) with which object
// of a bundle: the manifest, a part by its name, or what the parts contain.
type Error struct {
	Class  error
	Object string // `manifest`, `part "x.part.0"`, `archive`, …
	Detail string // what was found, and what to do if that is not obvious
	Err    error  // cause, if any
}

func (e *Error) Error() string {
	s := e.Object + ": "
	if e.Detail != "" {
		s += e.Detail
	} else {
		s += e.Class.Error()
	}
	if e.Err != nil {
		s += ": " + e.Err.Error()
	}
	return s
}

// Unwrap gives the class and the cause.
func (e *Error) Unwrap() []error {
	if e.Err == nil {
		return []error{e.Class}
	}
	return []error{e.Class, e.Err}
}

const (
	objManifest = "manifest"
	objArchive  = "archive in the parts" // what decryption yields: tar in gzip
)

func objPart(name string) string { return fmt.Sprintf("part %q", name) }

func fail(class error, object, format string, args ...any) error {
	return &Error{Class: class, Object: object, Detail: fmt.Sprintf(format, args...)}
}
