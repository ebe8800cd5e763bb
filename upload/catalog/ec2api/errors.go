package ec2api

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"

	"github.com/instar-image/instar/upload/catalog"
	"github.com/instar-image/instar/upload/catalog/sigv4"
	"github.com/instar-image/instar/upload/catalog/tasks"
)

// EC2's error codes beside those that package catalog has.
const (
	codeInvalidAction     = "InvalidAction"
	codeNoSuchVersion     = "NoSuchVersion"
	codeUnknownParameter  = "UnknownParameter"
	codeMalformedQuery    = "MalformedQueryString"
	codeMissingToken      = "MissingAuthenticationToken"
	codeIncomplete        = "IncompleteSignature"
	codeRequestExpired    = "RequestExpired"
	codeInvalidToken      = "InvalidPaginationToken"
	codeInstanceNotFound  = "InvalidInstanceID.NotFound"
	codeInstanceMalformed = "InvalidInstanceID.Malformed"
	codeBundleNotFound    = "InvalidBundleId.NotFound"
	codeBundling          = "BundlingInProgress"
	codeTooLarge          = "RequestEntityTooLarge"
	codeNotFound          = "NotFound"
	codeMethod            = "MethodNotAllowed"
	codeLimit             = "RequestLimitExceeded"
	codeFilterLimit       = "FilterLimitExceeded"
	codeSigScope          = "SignatureDoesNotMatch"
)

// refuse makes an error with one of EC2's codes.
func refuse(code, format string, a ...any) error {
	return &catalog.Error{Code: code, Message: fmt.Sprintf(format, a...)}
}

// status is the HTTP status that goes with a code.
func status(code string) int {
	switch code {
	case catalog.CodeAuthFailure:
		return http.StatusUnauthorized
	case codeMissingToken, catalog.CodeUnauthorized, codeSigScope, "InvalidClientTokenId":
		return http.StatusForbidden
	case catalog.CodeDryRun:
		return http.StatusPreconditionFailed
	case codeNotFound:
		return http.StatusNotFound
	case codeMethod:
		return http.StatusMethodNotAllowed
	case codeTooLarge:
		return http.StatusRequestEntityTooLarge
	case catalog.CodeInternal:
		return http.StatusInternalServerError
	case catalog.CodeUnavailable, codeLimit:
		return http.StatusServiceUnavailable
	}
	return http.StatusBadRequest
}

// answer is what a caller is told of an error: code and a message that shows
// nothing of the inside.
func answer(err error, service string) (code, message string) {
	var signature *sigv4.Error
	var refusal *catalog.Error
	switch {
	case errors.As(err, &signature):
		return signatureCode(signature, service), sentence(signature.Error())
	case errors.As(err, &refusal):
		message := refusal.Message
		if refusal.Err != nil && status(refusal.Code) < 500 && refusal.Code != catalog.CodeAMINotFound {
			message = fmt.Sprintf("%s: %v", message, refusal.Err)
		}
		return refusal.Code, sentence(message)
	case errors.Is(err, tasks.ErrNotFound):
		return codeBundleNotFound, "The bundle task does not exist."
	case errors.Is(err, catalog.ErrBusy), errors.Is(err, catalog.ErrUnknown):
		return catalog.CodeUnavailable, "The catalog is busy. Try again."
	case errors.Is(err, catalog.ErrReadOnly):
		return catalog.CodeUnauthorized, "This server has no key to sign changes of the catalog with: it only reads."
	}
	if errors.Is(err, context.DeadlineExceeded) {
		return catalog.CodeUnavailable, "The request took too long. Try again."
	}
	return catalog.CodeInternal, "An internal error has occurred. The server's log has the request's id."
}

func signatureCode(e *sigv4.Error, service string) string {
	switch e.Kind {
	case sigv4.ErrMissing:
		return codeMissingToken
	case sigv4.ErrIncomplete:
		return codeIncomplete
	case sigv4.ErrExpired:
		return codeRequestExpired
	case sigv4.ErrScope:
		return codeSigScope
	case sigv4.ErrSkew:
		// What EC2 and STS say of a wrong clock, and what the SDKs take for one:
		// they set theirs by the answer's Date and try again. After
		// RequestExpired, that for Go does not.
		if service == serviceSTS {
			return codeSigScope
		}
		return catalog.CodeAuthFailure
	}
	if service == serviceSTS {
		return "InvalidClientTokenId"
	}
	return catalog.CodeAuthFailure
}

// sentence begins with a capital.
func sentence(s string) string {
	if s == "" {
		return s
	}
	return strings.ToUpper(s[:1]) + s[1:]
}
