package main

import (
	"context"
	"errors"
)

var errNotYet = errors.New("not in this build")

func libraryCode(error) int { return 0 }

func runBundleImage(context.Context, *app, *bundleImageOptions) error         { return errNotYet }
func runBundleVol(context.Context, *app, *bundleVolOptions) error             { return errNotYet }
func runUpload(context.Context, *app, *uploadOptions) error                   { return errNotYet }
func runBundleAndUpload(context.Context, *app, *bundleAndUploadOptions) error { return errNotYet }
func runDownload(context.Context, *app, *downloadOptions) error               { return errNotYet }
func runDownloadAndUnbundle(context.Context, *app, *downloadOptions) error    { return errNotYet }
func runDelete(context.Context, *app, *deleteOptions) error                   { return errNotYet }
func runUnbundle(context.Context, *app, *unbundleOptions) error               { return errNotYet }
func runUnbundleStream(context.Context, *app, *streamOptions) error           { return errNotYet }
func runVerify(context.Context, *app, *verifyOptions) error                   { return errNotYet }
func runMigrateManifest(context.Context, *app, *migrateOptions) error         { return errNotYet }
func runMigrateBundle(context.Context, *app, *migrateOptions) error           { return errNotYet }
