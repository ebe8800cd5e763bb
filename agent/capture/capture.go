// Package capture makes bundles: of a live volume, planned and streamed as a
// filesystem image ([PlanVolume]), or of an image that exists ([OpenImage]).
//
// In go options and a [Destination], a directory or a store; out come parts
// and, last of all, a manifest, or nothing: what was written before a failure
// or a cancelled context is removed again. The package reads the volume or the
// image, and writes to the destination and, for filesystems other than ext4
// and for scripts, to scratch files that it removes. It does not log; what
// happens on the way is told to a [Reporter].
package capture

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/instar-image/instar/bundle/ec2"
)

// Reporter is told how a capture gets on. Its methods may be called
// concurrently.
type Reporter interface {
	// Phase begins something that will take total bytes, or 0 if that is not
	// known. It ends with the next phase or with the call it was reported by.
	Phase(name string, total int64)
	// Add counts bytes of the phase.
	Add(n int64)
	// Note tells something an operator should know.
	Note(text string)
	// Warn tells of something that is not as it should be; path may be "".
	Warn(path, text string)
}

// cleanupTime bounds the removal of what a failed run has written.
const cleanupTime = 60 * time.Second

// ManifestName is the name of a bundle's manifest.
func ManifestName(bundle string) string { return bundle + ".manifest.xml" }

// Result is a finished bundle.
type Result struct {
	Manifest *ec2.Manifest
	Document []byte // the signed XML
	Location string // where the manifest is
}

// Bundle bundles img into d: parts first, the manifest last. On failure
// nothing of it is left in d; the error wraps the cause, and what could not be
// removed, if anything.
func Bundle(ctx context.Context, o ec2.BundleOptions, img ec2.Image, d Destination, r Reporter) (*Result, error) {
	if err := d.Prepare(ctx, img.Name); err != nil {
		return nil, err
	}
	res, err := bundle(ctx, o, img, d, r)
	if err != nil {
		clean, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupTime)
		defer cancel()
		return nil, errors.Join(err, d.Abort(clean))
	}
	return res, nil
}

func bundle(ctx context.Context, o ec2.BundleOptions, img ec2.Image, d Destination, r Reporter) (*Result, error) {
	total := img.Size
	if img.Map != nil {
		total = img.Map.Bytes()
	}
	r.Phase("bundling "+img.Name, total)
	write := img.Write
	img.Write = func(ctx context.Context, w io.Writer) error { return write(ctx, counter{w, r}) }
	m, doc, err := ec2.Bundle(ctx, o, img, d)
	if err != nil {
		return nil, err
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	r.Phase("publishing "+img.Name, 0)
	location, err := d.Commit(ctx, m, doc)
	if err != nil {
		return nil, fmt.Errorf("publishing the bundle: %w", err)
	}
	return &Result{Manifest: m, Document: doc, Location: location}, nil
}

// counter tells a Reporter what passes.
type counter struct {
	w io.Writer
	r Reporter
}

func (c counter) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.r.Add(int64(n))
	return n, err
}
