package catalog

import (
	"errors"
	"fmt"
)

// What a caller may branch on, with errors.Is. Errors of the store are in the
// chain as package upload has them, those of signatures as bundle/keys has them.
var (
	ErrNoCatalog   = errors.New("there is no catalog in the store")
	ErrNoTrust     = errors.New("nobody is trusted")                                // Options.Trust is missing
	ErrReadOnly    = errors.New("no key to sign with")                              // Options.Signer is missing
	ErrOther       = errors.New("of another catalog")                               // a right document in another's place
	ErrRollback    = errors.New("older than one seen before")                       // or than was asked for
	ErrForked      = errors.New("contradicts one seen before")                      // the same sequence, another state
	ErrStale       = errors.New("too old to be taken as fresh")                     // expired, or beyond the age asked for
	ErrFormat      = errors.New("malformed")                                        // a document not in its one form
	ErrVersion     = errors.New("of a later version")                               // use a newer program
	ErrDamaged     = errors.New("not the bytes its name says")                      // an object of the store
	ErrUnknown     = errors.New("may or may not have been done")                    // the answer to the last request was lost for good
	ErrBusy        = errors.New("others keep changing it")                          // a conditional put lost too often
	ErrConditional = errors.New("the store does not keep conditions of its writes") // no catalog can be kept there
	ErrClock       = errors.New("this machine's clock is behind the catalog")       // set it
	ErrRegistered  = errors.New("a registered image needs it")                      // deregister it first
)

// EC2's error codes, the values of [Error.Code].
const (
	CodeAMINotFound      = "InvalidAMIID.NotFound"
	CodeAMIMalformed     = "InvalidAMIID.Malformed"
	CodeAMIUnavailable   = "InvalidAMIID.Unavailable"
	CodeAMINameDuplicate = "InvalidAMIName.Duplicate"
	CodeAMINameMalformed = "InvalidAMIName.Malformed"
	CodeAMIAttribute     = "InvalidAMIAttributeItemValue"
	CodeID               = "InvalidID" // of what is tagged
	CodeManifest         = "InvalidManifest"
	CodeKeyNotFound      = "InvalidKeyPair.NotFound"
	CodeKeyDuplicate     = "InvalidKeyPair.Duplicate"
	CodeKeyPairFormat    = "InvalidKeyPair.Format"
	CodeKeyFormat        = "InvalidKey.Format"
	CodeParameter        = "InvalidParameter"
	CodeParameterValue   = "InvalidParameterValue"
	CodeCombination      = "InvalidParameterCombination"
	CodeMissing          = "MissingParameter"
	CodeBlockDevice      = "InvalidBlockDeviceMapping"
	CodeTagLimit         = "TagLimitExceeded"
	CodeNotPermitted     = "OperationNotPermitted"
	CodeIdempotent       = "IdempotentParameterMismatch"
	CodeState            = "IncorrectState"
	CodeUnauthorized     = "UnauthorizedOperation"
	CodeAuthFailure      = "AuthFailure"
	CodeDryRun           = "DryRunOperation"
	CodeInternal         = "InternalError"
	CodeUnavailable      = "Unavailable"
	CodeTooMany          = "ResourceCountExceeded"
)

// Error is a refusal, with the code that EC2 has for it.
type Error struct {
	Code    string // one of the Code… values
	Message string // a sentence for people
	Err     error  // the cause, may be nil
}

// Error gives message, cause and code.
func (e *Error) Error() string {
	if e.Err != nil {
		return fmt.Sprintf("%s: %v (%s)", e.Message, e.Err, e.Code)
	}
	return e.Message + " (" + e.Code + ")"
}

// Unwrap gives the cause.
func (e *Error) Unwrap() error { return e.Err }

// CodeOf is the code EC2 has for err: that of an [*Error] in its chain;
// Unavailable if the outcome is unknown or others were faster too often, both
// worth a retry; else InternalError.
func CodeOf(err error) string {
	var e *Error
	switch {
	case err == nil:
		return ""
	case errors.As(err, &e):
		return e.Code
	case errors.Is(err, ErrUnknown), errors.Is(err, ErrBusy):
		return CodeUnavailable
	}
	return CodeInternal
}

func refuse(code, format string, a ...any) *Error {
	return &Error{Code: code, Message: fmt.Sprintf(format, a...)}
}
