package main

import (
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"syscall"

	"github.com/instar-image/instar/agent/capture"
	"github.com/instar-image/instar/agent/machine"
	"github.com/instar-image/instar/bundle/chunked"
	"github.com/instar-image/instar/bundle/disk"
	"github.com/instar-image/instar/bundle/ec2"
	"github.com/instar-image/instar/bundle/ext4"
	"github.com/instar-image/instar/bundle/keys"
	"github.com/instar-image/instar/bundle/qcow2"
	"github.com/instar-image/instar/bundle/rootfs"
	"github.com/instar-image/instar/metadata/imds"
	"github.com/instar-image/instar/upload"
	"github.com/instar-image/instar/upload/catalog"
	"github.com/instar-image/instar/upload/catalog/stored"
	"github.com/instar-image/instar/upload/images"
)

// libraryCode is the exit code for errors of the libraries, 0 for others.
func libraryCode(err error) int {
	is := func(targets ...error) bool {
		for _, t := range targets {
			if errors.Is(err, t) {
				return true
			}
		}
		return false
	}
	var (
		object  *upload.Error
		objects *upload.DeleteError
		small   *ext4.TooSmallError
		refusal *catalog.Error
		format  *chunked.Error // about an object in a store, not about an argument
	)
	switch {
	case is(catalog.ErrRollback, catalog.ErrStale, catalog.ErrForked, catalog.ErrOther, catalog.ErrDamaged, catalog.ErrNoTrust, catalog.ErrFormat, catalog.ErrVersion, stored.ErrDamaged):
		return exitTrust
	case is(catalog.ErrNoCatalog):
		return exitFile
	case is(catalog.ErrUnknown, catalog.ErrBusy, catalog.ErrConditional):
		return exitS3
	case is(upload.ErrBucketElsewhere):
		return exitLocation
	case is(upload.ErrKey):
		return exitUsage
	case errors.As(err, &objects), errors.As(err, &object):
		return exitS3
	case is(ec2.ErrSignature, ec2.ErrUnsigned, ec2.ErrDigest, ec2.ErrSize, ec2.ErrTruncated),
		is(keys.ErrUntrusted, keys.ErrSignature, keys.ErrNamespace, keys.ErrExpired),
		is(chunked.ErrRollback, chunked.ErrStale, chunked.ErrForked, chunked.ErrOther, chunked.ErrCorrupt, chunked.ErrForeign),
		is(images.ErrNoTrust, images.ErrLabel, images.ErrDamaged, keys.ErrWrapped),
		errors.As(err, &format) && is(chunked.ErrFormat, chunked.ErrLimit, chunked.ErrVersion):
		return exitTrust
	case is(chunked.ErrFormat):
		return exitUsage
	case is(images.ErrNoImage, images.ErrNoTrace, chunked.ErrDeleted, machine.ErrLost):
		return exitFile
	case is(images.ErrCollected, images.ErrBusy, chunked.ErrMissing):
		return exitS3
	case is(imds.ErrUnreachable, imds.ErrRefused, imds.ErrNotFound):
		return exitMetadata
	case is(ec2.ErrFormat, ec2.ErrTooNew, ec2.ErrTooOld, ec2.ErrEncrypted, ec2.ErrKey, ec2.ErrLimit, ec2.ErrOption),
		is(keys.ErrMode, keys.ErrAgent, keys.ErrAgentKey, keys.ErrWrong, keys.ErrPublic, keys.ErrKeyType, keys.ErrRecipient, keys.ErrIdentity, keys.ErrNoIdentity, keys.ErrAllowedSigners),
		is(chunked.ErrFormat, chunked.ErrVersion, chunked.ErrLimit, images.ErrUnfit, images.ErrLast, qcow2.ErrFormat, qcow2.ErrUnsupported, qcow2.ErrSize),
		is(keys.ErrNotFound, keys.ErrPassphrase, keys.ErrNotRSA, keys.ErrWeak, keys.ErrSeveral, keys.ErrMismatch, keys.ErrMalformed, keys.ErrTooLarge),
		is(capture.ErrImageSize, capture.ErrOption, rootfs.ErrNoMatch, rootfs.ErrPattern, rootfs.ErrNoFiles, disk.ErrSize, disk.ErrKind, ext4.ErrOptions, ext4.ErrTooLarge),
		errors.As(err, &small):
		return exitUsage
	case errors.As(err, &refusal):
		return exitUsage
	case is(fs.ErrNotExist, fs.ErrExist):
		return exitFile
	}
	// whatever else reading and writing brings is a failure of the pipeline
	var (
		path  *fs.PathError
		link  *os.LinkError
		call  *os.SyscallError
		errno syscall.Errno
		child *exec.ExitError // --script, mkfs
	)
	if errors.As(err, &child) || errors.As(err, &path) || errors.As(err, &link) || errors.As(err, &call) || errors.As(err, &errno) {
		return exitUsage
	}
	return 0
}
