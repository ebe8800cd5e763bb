package main

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/instar-image/instar/agent/capture"
	"github.com/instar-image/instar/bundle/disk"
	"github.com/instar-image/instar/bundle/ec2"
	"github.com/instar-image/instar/bundle/ext4"
	"github.com/instar-image/instar/bundle/rootfs"
	"github.com/instar-image/instar/cmd/instar/internal/ui"
	"github.com/instar-image/instar/internal/durable"
	"github.com/instar-image/instar/metadata/imds"
)

// defaultVolumeSize is the peers' default, in bytes, kept where it suffices.
const defaultVolumeSize = 10240 << 20

// volumeSize reads --size: MiB, or with a suffix, or "auto".
func volumeSize(s string) (bytes int64, ifFits bool, err error) {
	switch s {
	case "":
		return defaultVolumeSize, true, nil
	case "auto":
		return 0, false, nil
	}
	if mib, err := strconv.ParseInt(s, 10, 64); err == nil {
		if mib <= 0 || mib > 1<<40 {
			return 0, false, usagef("--size %s: want a number of MiB above 0, or auto", s)
		}
		return mib << 20, false, nil
	}
	n, err := parseSize(s)
	if err != nil {
		return 0, false, usagef("--size: %w", err)
	}
	return n &^ (1<<20 - 1), false, nil
}

func runBundleVol(ctx context.Context, a *app, o *bundleVolOptions) error {
	// What lives is the tree of all files, what is garbage little: collecting
	// early costs nothing that can be measured and halves the memory at two
	// million files. GOGC in the environment has the last word.
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(25)
	}
	plan, err := a.volumePlan(&o.volumeOptions, o.arch)
	if err != nil {
		return err
	}
	if o.inherit && o.noInherit {
		return usagef("--inherit and --no-inherit exclude each other")
	}
	plan.FS = o.fs
	plan.Root.Never = append(plan.Root.Never, a.secretFiles(o)...)
	if o.dryRun {
		return a.dryRun(ctx, plan)
	}
	name := o.prefix
	if name == "" {
		name = "image"
	}
	if o.cloneOnly {
		return a.clone(ctx, o, plan, name)
	}
	p, err := a.party(&o.identity)
	if err != nil {
		return err
	}
	b, err := a.bundleOptions(ctx, &o.imageOptions, p)
	if err != nil {
		return err
	}
	if err := a.inheritance(ctx, o, &b); err != nil {
		return err
	}
	dest, dir, done, err := a.volumeDestination(ctx, o, name)
	if err != nil {
		return err
	}
	defer done()
	plan.Root.Never = append(plan.Root.Never, p.paths...)
	if dir == "" {
		if _, storeDir, err := a.storeURL(&o.storage, a.conf.Get("store").Text); err == nil && storeDir != "" {
			plan.Root.Never = append(plan.Root.Never, storeDir)
		}
	} else {
		base := filepath.Join(dir, name)
		plan.Root.Never = append(plan.Root.Never, base+".part.*", base+".manifest.xml", filepath.Join(dir, "."+name+".partial-*"))
	}
	r := &reporter{ui: a.ui}
	defer r.end()
	v, err := capture.PlanVolume(ctx, *plan, r)
	if err != nil {
		return err
	}
	defer v.Close()
	r.end()
	a.checkSize(v.Disk.Size(), &o.imageOptions)
	img, err := v.Image(ctx, name)
	if err != nil {
		return err
	}
	res, err := capture.Bundle(ctx, b, img, dest, r)
	r.end()
	if err != nil {
		return err
	}
	if err := a.showBundle(res, dir); err != nil {
		return err
	}
	return a.afterCapture(v)
}

// afterCapture makes the exit status of files that changed. Under the peers'
// names those that merely changed are warnings: their callers take anything
// but 0 for failure, and a log file grows on every live system.
func (a *app) afterCapture(v *capture.Volume) error {
	lost := len(v.Root.Problems) + v.Flawed()
	for _, c := range v.Changes() {
		if c.Kind == ext4.Unreadable {
			lost++
		}
	}
	n := len(v.Changes()) + len(v.Root.Problems) + v.Flawed()
	if n == 0 || a.family != familyInstar && lost == 0 {
		return nil
	}
	return failf(exitChanged, "done, but %d files changed, could not be read or cannot be in the image as they are; they are named above", n)
}

// volumePlan makes the capture's options of the command's; arch is --arch.
func (a *app) volumePlan(o *volumeOptions, arch string) (*capture.VolumeOptions, error) {
	if o.fstab != "" && o.generateFstab {
		return nil, usagef("--fstab and --generate-fstab exclude each other")
	}
	if o.volume == "" {
		o.volume = "/"
	}
	if err := isDir(o.volume, "--volume"); err != nil {
		return nil, err
	}
	size, ifFits, err := volumeSize(o.size)
	if err != nil {
		return nil, err
	}
	if o.readShare < 0 || o.readShare > 100 {
		return nil, usagef("--read-share %d: a percentage is 1 to 100", o.readShare)
	}
	kind := disk.None
	if o.partition != "" {
		if kind, err = disk.ParseKind(o.partition); err != nil {
			return nil, err
		}
	}
	plan := &capture.VolumeOptions{
		Root: rootfs.Options{
			Volume: o.volume, All: o.all, Exclude: o.exclude, ExcludeLoose: o.strays, Include: o.include, NoFilter: o.noFilter,
			Snapshotted: a.snapshotted,
		},
		Size: size, SizeIfFits: ifFits, Partition: kind, ReadShare: o.readShare,
	}
	if o.label != "" {
		plan.Label = &o.label
	}
	if plan.UUID, err = parseUUID(o.uuid); err != nil {
		return nil, err
	}
	if o.noSnapshot {
		plan.Root.Snapshot = rootfs.SnapshotNone
	}
	if o.scratch == "" {
		o.scratch = a.tempDir()
	}
	plan.Scratch = o.scratch
	if o.script != "" {
		if err := isFile(o.script, "--script"); err != nil {
			return nil, err
		}
		plan.Root.Script = &rootfs.Script{Path: o.script, Dir: o.scratch, Stdout: a.stderr, Stderr: a.stderr}
	}
	return plan, o.bootFiles(arch, &plan.Root)
}

// bootFiles reads what the options put into the image in place of the
// volume's own.
func (o *volumeOptions) bootFiles(arch string, r *rootfs.Options) (err error) {
	if o.fstab != "" {
		if r.Fstab, err = os.ReadFile(o.fstab); err != nil {
			return failf(exitFile, "--fstab: %w", err)
		}
	}
	if o.generateFstab {
		r.FstabKind = rootfs.FstabModern
		if arch == "i386" {
			r.FstabKind = rootfs.FstabLegacy
		}
	}
	if o.grubConfig == "" {
		return nil
	}
	if o.partition != "mbr" && o.partition != "gpt" {
		return usagef("--grub-config needs --partition mbr or gpt: the bare filesystem has no boot loader")
	}
	if r.GrubConfig, err = os.ReadFile(o.grubConfig); err != nil {
		return failf(exitFile, "--grub-config: %w", err)
	}
	return nil
}

// parseUUID reads --uuid: nothing, "new", or a UUID.
func parseUUID(s string) (*[16]byte, error) {
	var u [16]byte
	switch s {
	case "":
		return nil, nil
	case "new":
		rand.Read(u[:])
		u[6], u[8] = u[6]&0x0f|0x40, u[8]&0x3f|0x80
		return &u, nil
	}
	b, err := hex.DecodeString(strings.ReplaceAll(s, "-", ""))
	if err != nil || copy(u[:], b) != len(u) || len(b) != len(u) || u == [16]byte{} {
		return nil, usagef("--uuid %q: want 32 hex digits, with or without hyphens, or new", s)
	}
	return &u, nil
}

// secretFiles are key files the options and the configuration name; they stay
// out whatever else is asked for.
func (a *app) secretFiles(o *bundleVolOptions) []string {
	var never []string
	for _, p := range []string{
		a.setting("private_key", "--privatekey", o.key), a.setting("certificate", "--cert", o.cert),
		a.setting("secret_key_file", "--secret-key-file", o.secretKeyFile),
	} {
		if p != "" && p != "-" && !slices.Contains(never, p) {
			never = append(never, p)
		}
	}
	return never
}

// volumeDestination is where the bundle goes: a directory, or with -b storage.
func (a *app) volumeDestination(ctx context.Context, o *bundleVolOptions, name string) (d capture.Destination, dir string, done func(), err error) {
	done = func() {}
	if a.setting("store", "--bucket", o.bucket) == "" || o.destination != "" && o.bucket == "" {
		dir, err = a.workDir(o.destination)
		return &capture.Dir{Path: dir}, dir, done, err
	}
	if o.destination != "" {
		return nil, "", done, usagef("--destination and --bucket exclude each other")
	}
	store, err := a.openWritable(ctx, &o.storage)
	if err != nil {
		return nil, "", done, err
	}
	if !o.replace { // said before the scan; Prepare looks again
		if _, err := store.Stat(ctx, capture.ManifestName(name)); err == nil {
			store.Close()
			return nil, "", done, withHint(failf(exitFile, "%s/%s is stored already", store, capture.ManifestName(name)),
				"--replace replaces it; --prefix gives the new bundle another name.")
		}
	}
	return &capture.Bucket{Store: store, Replace: o.replace, Removed: a.showRemoved}, "", func() { store.Close() }, nil
}

// inheritTime is how long metadata is waited for when nobody asked for it.
const inheritTime = 2 * time.Second

// inheritance fills what the options leave open from the instance's metadata.
func (a *app) inheritance(ctx context.Context, o *bundleVolOptions, b *ec2.BundleOptions) error {
	if o.noInherit {
		return nil
	}
	if strings.EqualFold(a.getenv("AWS_EC2_METADATA_DISABLED"), "true") {
		if o.inherit {
			return failf(exitMetadata, "--inherit: AWS_EC2_METADATA_DISABLED turns metadata off")
		}
		return nil
	}
	client, err := imds.New(imds.Options{Endpoint: a.getenv("AWS_EC2_METADATA_SERVICE_ENDPOINT")})
	if err != nil {
		return failf(exitUsage, "AWS_EC2_METADATA_SERVICE_ENDPOINT: %w", err)
	}
	wait := inheritTime
	if o.inherit {
		wait = 10 * inheritTime
	}
	ask, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	got, err := client.Ancestry(ask)
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case err != nil && o.inherit:
		return withHint(failf(exitMetadata, "--inherit: %w", err), "Without --inherit the bundle is made all the same.")
	case err != nil:
		a.ui.Warn("no metadata: kernel, ramdisk and mappings are not inherited ("+reason(err)+")", nil)
		return nil
	}
	if len(got.Missing) > 0 {
		a.ui.Say("note: the metadata has no %s", strings.Join(got.Missing, ", "))
	}
	b.Ancestors = got.Ancestors
	if b.KernelID == "" {
		b.KernelID = got.KernelID
	}
	if b.RamdiskID == "" {
		b.RamdiskID = got.RamdiskID
	}
	if len(b.ProductCodes) == 0 {
		b.ProductCodes = got.ProductCodes
	}
	if len(b.BlockDeviceMapping) == 0 {
		for _, m := range got.Mappings {
			b.BlockDeviceMapping = append(b.BlockDeviceMapping, ec2.Mapping{Virtual: m.Virtual, Device: m.Device})
		}
	}
	return nil
}

func reason(err error) string {
	if errors.Is(err, context.DeadlineExceeded) {
		return "nothing answers within " + inheritTime.String()
	}
	return err.Error()
}

// clone writes the image alone.
func (a *app) clone(ctx context.Context, o *bundleVolOptions, plan *capture.VolumeOptions, name string) error {
	dir, err := a.workDir(o.destination)
	if err != nil {
		return err
	}
	path := filepath.Join(dir, name)
	plan.Root.Never = append(plan.Root.Never, path, filepath.Join(dir, durable.Temp+"*"))
	r := &reporter{ui: a.ui}
	defer r.end()
	v, err := capture.PlanVolume(ctx, *plan, r)
	if err != nil {
		return err
	}
	defer v.Close()
	img, err := v.Image(ctx, name)
	if err != nil {
		return err
	}
	if err := capture.WriteImage(ctx, img, path, r); err != nil {
		return err
	}
	r.end()
	err = a.ui.Result("image", "Image is "+path, ui.Fields{"path": path, "name": name, "size": v.Disk.Size()})
	if err != nil {
		return err
	}
	return a.afterCapture(v)
}

// dryRun tells what would stay out and how big the image would be.
func (a *app) dryRun(ctx context.Context, plan *capture.VolumeOptions) error {
	plan.Root.Measure = true
	r := &reporter{ui: a.ui}
	defer r.end()
	v, err := capture.PlanVolume(ctx, *plan, r)
	if err != nil {
		return err
	}
	defer v.Close()
	r.end()
	for _, l := range v.Root.LeftOut {
		size := "?"
		if l.Bytes >= 0 {
			size = ui.Size(l.Bytes)
		}
		kept := ""
		if l.Kept != "" {
			kept = "; an " + l.Kept + " stands in its place"
		}
		err := a.ui.Result("left_out", fmt.Sprintf("%-10s %10s  %s  (%s%s)", l.Class, size, shown("/"+l.Path), l.Why, kept), ui.Fields{
			"path": l.Path, "class": l.Class, "rule": l.Rule, "why": l.Why, "bytes": l.Bytes, "files": l.Files, "kept": l.Kept,
		})
		if err != nil {
			return err
		}
	}
	data := v.Disk.Map().Bytes()
	return a.ui.Result("plan", fmt.Sprintf("%d files and %s of data go in; the image has %s, of which %s are written; %d paths stay out",
		v.Root.Seen.Files, ui.Size(v.Root.Seen.Bytes), ui.Size(v.Disk.Size()), ui.Size(data), len(v.Root.LeftOut)), ui.Fields{
		"files": v.Root.Seen.Files, "bytes": v.Root.Seen.Bytes, "image_size": v.Disk.Size(), "image_data": data, "left_out": len(v.Root.LeftOut),
	})
}
