package chunked

import (
	"errors"
	"fmt"
)

// Classes of error, for callers that branch. Every error of this package about
// something stored is an [*Error] that wraps one of them.
var (
	ErrCorrupt = errors.New("corrupt")                    // not the bytes that were written: tag, digest, length or name
	ErrFormat  = errors.New("malformed")                  // authentic or not, it breaks the format's rules
	ErrVersion = errors.New("of an unknown version")      // made by a later version of this program
	ErrMissing = errors.New("not in the store")           // what a Source's errors wrap if an object is not there
	ErrForeign = errors.New("of another domain")          // another secret made it
	ErrLimit   = errors.New("larger than an image has")   // beyond a limit of the format
	ErrUsage   = errors.New("the call breaks a contract") // by the caller of this package, not by stored bytes
)

// Error says what is wrong (Class, one of the Err… values) with which object.
type Error struct {
	Class  error
	Object string // `pack 12ab…`, `index root 34cd…`, `chunk 56ef… in pack …`
	Detail string // what was found
	Err    error  // cause, if any
}

func (e *Error) Error() string {
	s := e.Object + ": " + e.Class.Error()
	if e.Detail != "" {
		s += ": " + e.Detail
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

func bad(class error, object, format string, a ...any) error {
	return &Error{Class: class, Object: object, Detail: fmt.Sprintf(format, a...)}
}
