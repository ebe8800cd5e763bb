package main

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"github.com/instar-image/instar/bundle/keys"
	"github.com/instar-image/instar/cmd/instar/internal/ui"
	"github.com/instar-image/instar/upload/images"
)

type traceOptions struct {
	imageStore
	fresh
	put, sign      string
	remove, ranges bool
}

func newImagesTrace(a *app) *cobra.Command {
	var o traceOptions
	const test = "images"
	cmd := a.named("trace IMAGE", "show, store or delete what a boot of an image reads first", `
An image can have a boot trace: the ranges of its disk that a boot reads, in
their order, signed. A machine that boots lazily fetches them ahead, and
"create-image --boot-trace" lays them out together. It is only ever a hint: a
wrong one costs time, never bytes that are not right.

"instar launch --record-trace IMAGE" records and stores one. --put stores one
that a machine recorded itself, booted with instar.trace=record:
/run/instar/trace.json. Each version of an image has its own.
`+aboutNames, `
  instar images trace web-1 --store s3://images/fleet
  instar images trace web-1 --ranges --store s3://images/fleet
  instar images trace web-1 --put trace.json --store s3://images/fleet
  instar images trace web-1@parent --delete --store s3://images/fleet`, 1, 1,
		func(ctx context.Context, args []string) error { return runImagesTrace(ctx, a, &o, args[0]) })
	f := flagsOf(cmd)
	f.yes(&o.ranges, "ranges", "", "print position and length of each range, one a line", ofUs, test)
	f.text(&o.put, "put", "", "sign and store the reads recorded in `FILE`", ofUs, test)
	completeFiles(cmd, "put", "json")
	f.yes(&o.remove, "delete", "", "delete the trace", ofUs, test)
	f.text(&o.sign, "sign", "", "with --put: sign with the SSH `KEY`: a private key's file, a public one's whose other half the SSH agent has, or agent", ofUs, test)
	o.imageStore.add(a, cmd, test)
	o.fresh.add(cmd, test)
	return cmd
}

func runImagesTrace(ctx context.Context, a *app, o *traceOptions, ref string) error {
	if o.put != "" && (o.remove || o.ranges) || o.remove && o.ranges {
		return usagef("--put, --delete and --ranges are three things to do")
	}
	if o.sign != "" && o.put == "" {
		return usagef("--sign goes with --put")
	}
	s, err := a.browseImages(ctx, &o.imageStore)
	if err != nil {
		return err
	}
	defer s.Close()
	img, err := a.resolve(ctx, s, ref, &o.fresh)
	if err != nil {
		return err
	}
	switch {
	case o.remove:
		if err := img.DeleteTrace(ctx); err != nil {
			return err
		}
		return a.ui.Result("trace", fmt.Sprintf("%s has no boot trace any more", versionText(img)), ui.Fields{"image": img.Manifest.Name, "manifest": img.Name.String(), "deleted": true})
	case o.put != "":
		f, err := os.Open(o.put)
		if err != nil {
			return failf(exitFile, "--put: %w", err)
		}
		defer f.Close()
		ranges, err := images.ReadRanges(f)
		if err != nil {
			return failf(exitUsage, "--put %s: %w", o.put, err)
		}
		signer, err := a.signer(ctx, &o.imageStore, o.sign)
		if err != nil {
			return err
		}
		t, err := img.PutTrace(ctx, ranges, signer)
		if err != nil {
			return err
		}
		return a.showTrace(img, t)
	}
	t, err := img.Trace(ctx)
	if errors.Is(err, images.ErrNoTrace) {
		return withHint(failf(exitFile, "%w", err), "\"instar launch --record-trace %s\" records one.", ref)
	}
	if err != nil {
		return err
	}
	if !o.ranges {
		return a.showTrace(img, t)
	}
	for _, r := range t.Ranges {
		if err := a.ui.Result("range", fmt.Sprintf("%d %d", r.Position, r.Length), ui.Fields{"position": r.Position, "length": r.Length}); err != nil {
			return err
		}
	}
	return nil
}

func versionText(img *images.Image) string {
	return img.Manifest.Name + "@" + img.Name.String()[:digits]
}

func (a *app) showTrace(img *images.Image, t *images.Trace) error {
	return a.ui.Result("trace", fmt.Sprintf("%s: %s", versionText(img), traceLine(t)), traceFields(img, t))
}

func traceLine(t *images.Trace) string {
	return fmt.Sprintf("%s in %d ranges, recorded %s, signed by %s", ui.Size(t.Bytes), len(t.Ranges), stamp(t.Created), keys.Fingerprint(t.Signer))
}

func traceFields(img *images.Image, t *images.Trace) ui.Fields {
	return ui.Fields{
		"image": img.Manifest.Name, "manifest": img.Name.String(), "ranges": len(t.Ranges), "bytes": t.Bytes, "size": t.Size,
		"created": t.Created, "signer": keys.Fingerprint(t.Signer),
	}
}

// traceText is what "images show" says of an image's trace.
func (a *app) traceText(ctx context.Context, img *images.Image, f ui.Fields) string {
	t, err := img.Trace(ctx)
	switch {
	case errors.Is(err, images.ErrNoTrace):
		return "none"
	case err != nil:
		f["trace_error"] = err.Error()
		return fmt.Sprintf("not used: %v", err)
	}
	f["trace"] = traceFields(img, t)
	return traceLine(t)
}
