package upload

import (
	"errors"
	"fmt"
	"strings"
	"time"
)

// What a caller may branch on, with errors.Is. The text of an [*Error] adds
// what the server said.
var (
	ErrNotExist        = errors.New("object does not exist")
	ErrExist           = errors.New("object exists or has changed") // a precondition was refused
	ErrChanged         = errors.New("object was replaced while it was read")
	ErrAccess          = errors.New("access denied")
	ErrCredentials     = errors.New("credentials missing, wrong or expired")
	ErrClockSkew       = errors.New("clock differs too much from the server's")
	ErrNoBucket        = errors.New("bucket does not exist")
	ErrBucketElsewhere = errors.New("bucket is in another location")
	ErrNotEmpty        = errors.New("bucket is not empty")
	ErrLocked          = errors.New("object is locked against deletion")
	ErrACL             = errors.New("access control list refused")
	ErrTooLarge        = errors.New("object is too large")
	ErrKey             = errors.New("key is not usable")
	ErrCorrupt         = errors.New("content differs from its digest")
	ErrUnsupported     = errors.New("not supported by the server")
	ErrUnreachable     = errors.New("server not reached")
	ErrNoSpace         = errors.New("no space left in the store")
)

// Error is a failed operation on a store or one of its objects. It never
// carries a secret.
type Error struct {
	Op     string // "put", "get", "list", …
	Store  string // the store's URL
	Key    string // relative to the store; "" when the store as a whole is meant
	Kind   error  // one of the sentinels, or nil
	Err    error  // the cause, may be nil
	Advice string // what to do about it, a clause; may be empty

	// From the server's reply; empty or zero without one.
	Status    int
	Code      string // such as "AccessDenied"
	Message   string
	RequestID string
	Location  string // with ErrBucketElsewhere: where the bucket is

	Attempts int       // how often it was tried
	Until    time.Time // with ErrLocked: end of the retention, when known

	retry   bool // worth another attempt
	unclear bool // the operation may have been carried out all the same
	after   time.Duration
}

func newError(op, store, key string, kind, err error) *Error {
	return &Error{Op: op, Store: store, Key: key, Kind: kind, Err: err}
}

// Error tells what failed, on which object, what the server said and what to do.
func (e *Error) Error() string {
	var b strings.Builder
	b.WriteString(e.Op)
	b.WriteByte(' ')
	b.WriteString(e.Store)
	if e.Key != "" {
		b.WriteByte('/')
		b.WriteString(e.Key)
	}
	if e.Kind != nil {
		b.WriteString(": " + e.Kind.Error())
	}
	if e.Location != "" {
		fmt.Fprintf(&b, " (%s)", e.Location)
	}
	if !e.Until.IsZero() {
		fmt.Fprintf(&b, " until %s", e.Until.UTC().Format(time.RFC3339))
	}
	switch {
	case e.Code != "" || e.Message != "":
		fmt.Fprintf(&b, ": the server says %s", e.Code)
		if e.Message != "" && e.Message != e.Code {
			fmt.Fprintf(&b, " %q", e.Message)
		}
		if e.Status != 0 {
			fmt.Fprintf(&b, " (HTTP %d", e.Status)
			if e.RequestID != "" {
				fmt.Fprintf(&b, ", request %s", e.RequestID)
			}
			b.WriteByte(')')
		}
	case e.Status != 0 && e.Err == nil:
		fmt.Fprintf(&b, ": the server answers HTTP %d", e.Status)
		if e.RequestID != "" {
			fmt.Fprintf(&b, " (request %s)", e.RequestID)
		}
	case e.Err != nil:
		b.WriteString(": " + e.Err.Error())
	}
	if e.Attempts > 1 {
		fmt.Fprintf(&b, " (tried %d times)", e.Attempts)
	}
	if e.Advice != "" {
		b.WriteString("; " + e.Advice)
	}
	return b.String()
}

// Unwrap gives the sentinel and the cause.
func (e *Error) Unwrap() []error {
	var u []error
	if e.Kind != nil {
		u = append(u, e.Kind)
	}
	if e.Err != nil {
		u = append(u, e.Err)
	}
	return u
}

// DeleteError lists what a Delete could not remove; the rest is gone.
type DeleteError struct {
	Failed []*Error
}

// Error names up to ten of the objects, each with its reason.
func (e *DeleteError) Error() string {
	var b strings.Builder
	if len(e.Failed) == 1 {
		return e.Failed[0].Error()
	}
	fmt.Fprintf(&b, "%d objects were not deleted", len(e.Failed))
	for i, f := range e.Failed {
		if i == 10 {
			fmt.Fprintf(&b, "; and %d more", len(e.Failed)-i)
			break
		}
		b.WriteString("; " + f.Error())
	}
	return b.String()
}

// Unwrap gives the errors of the single objects.
func (e *DeleteError) Unwrap() []error {
	u := make([]error, len(e.Failed))
	for i, f := range e.Failed {
		u[i] = f
	}
	return u
}
