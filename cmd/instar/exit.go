package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
)

// The exit codes. 0-3, 5-12, 254 and 255 mean what they mean in
// ec2-ami-tools; 4 and 24 are Instar's own.
const (
	exitOK        = 0
	exitUsage     = 1
	exitFile      = 2
	exitS3        = 3
	exitTrust     = 4
	exitPrompt    = 5
	exitMapping   = 6
	exitLocation  = 10
	exitMetadata  = 12
	exitChanged   = 24
	exitOther     = 254
	exitInterrupt = 255
)

// exitTable is the EXIT STATUS of every manual page.
func exitTable() []struct {
	code int
	what string
} {
	return []struct {
		code int
		what string
	}{
		{exitOK, "done"},
		{exitUsage, "the command line is wrong, or making or reading the bundle failed"},
		{exitFile, "a file is missing, or stands where one is to be made"},
		{exitS3, "the bucket or an object cannot be read or written"},
		{exitTrust, "the signature or a digest is not right: nothing was written"},
		{exitPrompt, "a question was not answered within 30 seconds, or deletion was declined"},
		{exitMapping, "a kernel or ramdisk has no counterpart in the other region"},
		{exitLocation, "the bucket is in another location than asked for"},
		{exitMetadata, "the instance's metadata did not answer, and --inherit asked for it"},
		{exitChanged, "done, but files changed, vanished or could not be read meanwhile: each was named"},
		{exitOther, "an unexpected error"},
		{exitInterrupt, "interrupted; nothing half-made was left behind"},
	}
}

// exitError is an error whose exit code and hint are known.
type exitError struct {
	code int
	err  error
	hint string
}

func (e *exitError) Error() string { return e.err.Error() }
func (e *exitError) Unwrap() error { return e.err }

// failf makes an error with an exit code.
func failf(code int, format string, args ...any) error {
	return &exitError{code: code, err: fmt.Errorf(format, args...)}
}

// usagef is for a command line that cannot be meant.
func usagef(format string, args ...any) error {
	return &exitError{code: exitUsage, err: fmt.Errorf("%w: "+format, append([]any{errUsage}, args...)...)}
}

// errUsage marks errors after which "Try 'TOOL --help'" is of use. Its text is
// not printed.
var errUsage = errors.New("usage")

// errShown ends a command that has done all there is to do: --version, --manual.
var errShown = errors.New("shown")

// withHint adds what may help.
func withHint(err error, format string, args ...any) error {
	var e *exitError
	if errors.As(err, &e) && e.hint == "" {
		return &exitError{e.code, err, fmt.Sprintf(format, args...)}
	}
	return &exitError{exitCode(err), err, fmt.Sprintf(format, args...)}
}

// exitCode maps an error to the exit code: the one place that does.
func exitCode(err error) int {
	var e *exitError
	switch {
	case err == nil || errors.Is(err, errShown):
		return exitOK
	case errors.Is(err, context.Canceled):
		return exitInterrupt
	case errors.As(err, &e):
		return e.code
	}
	if code := libraryCode(err); code != 0 {
		return code
	}
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrExist) {
		return exitFile
	}
	return exitOther
}
