package images_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/s3/types"

	"github.com/instar-image/instar/test/servers"
	"github.com/instar-image/instar/upload"
	"github.com/instar-image/instar/upload/images"
	"github.com/instar-image/instar/upload/s3fault"
)

func serverOptions(s *servers.Server) upload.Options {
	return upload.Options{
		Endpoint: s.Endpoint, Region: s.Region, Credentials: &upload.Credentials{AccessKeyID: s.AccessKey, SecretAccessKey: s.SecretKey},
		Retry: upload.Retry{Base: time.Millisecond, Max: 10 * time.Millisecond},
	}
}

func openBucket(t testing.TB, url string, o upload.Options) upload.Store {
	t.Helper()
	s, err := upload.Open(t.Context(), url, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

// TestServers lives an image's life in directories and on real servers.
func TestServers(t *testing.T) {
	minio, versity := servers.MinIO(t), servers.Versity(t)
	for _, c := range []struct {
		name string
		open func(t *testing.T) upload.Store
	}{
		{"directory", func(t *testing.T) upload.Store { return openBucket(t, t.TempDir(), upload.Options{}) }},
		{"minio", func(t *testing.T) upload.Store {
			return openBucket(t, "s3://"+minio.Bucket(t)+"/some/prefix", serverOptions(minio))
		}},
		{"versitygw", func(t *testing.T) upload.Store {
			return openBucket(t, "s3://"+versity.Bucket(t), serverOptions(versity))
		}},
	} {
		t.Run(c.name, func(t *testing.T) { life(t, c.open(t)) })
	}
}

func life(t *testing.T, objects upload.Store) {
	ctx := t.Context()
	p := newPeople(t)
	o := p.options(t.TempDir())
	o.Local, o.Parallel = nil, 8
	s, err := images.Open(objects, o)
	must(t, err)
	one, two := words("a b c d e f g h i"), words("a b c X e f g h Y")
	v1, err := p.capture(ctx, s, "web", one)
	must(t, err)
	_, err = p.capture(ctx, s, "web", two)
	must(t, err)
	mustRead(t, s, "web", two)
	mustRead(t, s, "web@parent", one)
	img, err := s.Resolve(ctx, "web", images.ResolveOptions{MaxAge: time.Hour, AtLeast: 2})
	if err != nil || img.Freshness != images.Limited {
		t.Fatalf("%+v, %v", img, err)
	}
	other := newIdentity(t)
	must(t, img.AddRecipient(ctx, other.Recipient()))
	q := *p
	q.id = other
	mustRead(t, q.open(t, objects, ""), "web", two)
	must(t, img.RemoveRecipient(ctx, other.Recipient().String()))
	if _, err := read(ctx, q.open(t, objects, ""), "web"); err == nil {
		t.Error("who is no recipient any more can open the image")
	}
	if l, err := img.Recipients(ctx); err != nil || len(l) != 1 {
		t.Errorf("recipients: %v, %v", l, err)
	}
	_, err = s.Delete(ctx, "web@"+v1.Name.String(), p.signer)
	must(t, err)
	d, err := s.Domain(ctx, "main", images.DomainOptions{})
	must(t, err)
	repack := &images.Repack{Below: 95, Domain: d, Owner: p.owner}
	r, err := s.GC(ctx, images.GCOptions{Grace: -1, Repack: repack})
	if err != nil || len(r.Repacked) == 0 || len(r.Condemned) == 0 {
		t.Fatalf("%+v, %v", r, err)
	}
	r, err = s.GC(ctx, images.GCOptions{Grace: -1})
	if err != nil || len(r.Swept) == 0 {
		t.Fatalf("%+v, %v", r, err)
	}
	mustRead(t, s, "web", two)
	for o, err := range objects.List(ctx, "packs/") {
		must(t, err)
		must(t, objects.Delete(ctx, o.Key))
		break
	}
	if r, err := s.Verify(ctx, images.VerifyOptions{}); err != nil || r.Sound() {
		t.Errorf("a pack is missing: %+v, %v", r, err)
	}
	rep, err := s.Repair(ctx, images.RepairOptions{Domain: d, Owner: p.owner, Candidates: []images.Candidate{images.Disk{ReaderAt: bytes.NewReader(text(two))}}})
	if err != nil || len(rep.Lost) > 0 || len(rep.Moved) == 0 {
		t.Fatalf("%+v, %v", rep, err)
	}
	mustRead(t, s, "web", two)
	if r, err := s.Verify(ctx, images.VerifyOptions{ReadData: true}); err != nil || !r.Sound() {
		t.Errorf("%+v, %v", r, err)
	}
	_, err = s.Delete(ctx, "web", p.signer)
	must(t, err)
	for range 3 {
		_, err = s.GC(ctx, images.GCOptions{Grace: -1})
		must(t, err)
	}
	var left []string
	for o, err := range objects.List(ctx, "") {
		must(t, err)
		if !strings.HasPrefix(o.Key, images.Quarantine) {
			left = append(left, o.Key)
		}
	}
	if fmt.Sprint(left) != "[domains/main images/web/head]" {
		t.Errorf("left: %q", left)
	}
}

// TestVersionedBucket collects in a bucket that keeps versions and locks some:
// versions go when that is asked for, what is locked is named and left, and what
// can still be brought back because something refers to it stays.
func TestVersionedBucket(t *testing.T) {
	server := servers.MinIO(t)
	o := serverOptions(server)
	client := s3.New(s3.Options{
		BaseEndpoint: &o.Endpoint, Region: o.Region, UsePathStyle: true,
		Credentials: aws.CredentialsProviderFunc(func(context.Context) (aws.Credentials, error) {
			return aws.Credentials{AccessKeyID: o.Credentials.AccessKeyID, SecretAccessKey: o.Credentials.SecretAccessKey}, nil
		}),
	})
	name := "instar-versioned"
	if _, err := client.CreateBucket(t.Context(), &s3.CreateBucketInput{Bucket: &name, ObjectLockEnabledForBucket: aws.Bool(true)}); err != nil {
		t.Fatal(err)
	}
	objects := openBucket(t, "s3://"+name, o)
	p := newPeople(t)
	s := p.open(t, objects, "")
	v, err := p.capture(t.Context(), s, "web", words("a b c d e f"))
	must(t, err)
	_, err = p.capture(t.Context(), s, "mail", words("m n o"))
	must(t, err)
	locked := "packs/" + v.Manifest.Packs[0].Name.String()[:2] + "/" + v.Manifest.Packs[0].Name.String()
	until := time.Now().Add(time.Hour)
	if _, err := client.PutObjectRetention(t.Context(), &s3.PutObjectRetentionInput{
		Bucket: &name, Key: &locked,
		Retention: &types.ObjectLockRetention{Mode: types.ObjectLockRetentionModeCompliance, RetainUntilDate: &until},
	}); err != nil {
		t.Fatal(err)
	}
	_, err = s.Delete(t.Context(), "web", p.signer)
	must(t, err)
	for range 2 {
		if _, err := s.GC(t.Context(), images.GCOptions{Grace: -1}); err != nil {
			t.Fatal(err)
		}
	}
	// Somebody deletes what an image needs: its versions are the way back.
	mail, err := s.Resolve(t.Context(), "mail", images.ResolveOptions{})
	must(t, err)
	needed := "packs/" + mail.Manifest.Packs[0].Name.String()[:2] + "/" + mail.Manifest.Packs[0].Name.String()
	must(t, objects.Delete(t.Context(), needed))
	dry, err := s.GC(t.Context(), images.GCOptions{Grace: -1, Versions: true, DryRun: true})
	must(t, err)
	before := versionKeys(t, objects)
	r, err := s.GC(t.Context(), images.GCOptions{Grace: -1, Versions: true})
	must(t, err)
	if len(r.Locked) != 1 || !errors.Is(r.Locked[0], upload.ErrLocked) || r.Locked[0].Key != locked {
		t.Errorf("locked: %v", r.Locked)
	}
	if r.OldVersions.Objects == 0 || dry.OldVersions.Objects != r.OldVersions.Objects+2 { // the pack and its marker
		t.Errorf("%+v versions removed, a dry run said %+v", r.OldVersions, dry.OldVersions)
	}
	after := versionKeys(t, objects)
	if after[locked] == 0 || after[needed] != before[needed] {
		t.Errorf("versions of the locked pack: %d, of the needed one: %d, were %d", after[locked], after[needed], before[needed])
	}
	for k := range after {
		if k != locked && k != needed && strings.HasPrefix(k, "packs/") {
			t.Errorf("versions of %s are left", k)
		}
	}
	if again, err := s.GC(t.Context(), images.GCOptions{Grace: -1, Versions: true}); err != nil || len(again.Locked) != 1 {
		t.Errorf("again: %+v, %v", again, err)
	}
}

func versionKeys(t testing.TB, objects upload.Store) map[string]int {
	t.Helper()
	n := map[string]int{}
	for v, err := range objects.(upload.Versioner).Versions(t.Context(), "") {
		must(t, err)
		n[v.Key]++
	}
	return n
}

// TestServerFaults lets each request of a capture and a collection on a real
// server go wrong once: both end well, or say so and end well when run again.
func TestServerFaults(t *testing.T) {
	t.Parallel()
	server := servers.MinIO(t)
	proxy := s3fault.New(server.Endpoint)
	t.Cleanup(proxy.Close)
	o := serverOptions(server)
	o.Endpoint = proxy.URL
	var faults []s3fault.Fault
	for _, f := range s3fault.All() {
		switch f {
		case s3fault.StallRequest, s3fault.StallReply, s3fault.StallBody, s3fault.Trickle:
			// Package upload's own tests wait for these.
		default:
			faults = append(faults, f)
		}
	}
	p := newPeople(t)
	next, fine, failed := 0, 0, 0
	step := 1
	if raced {
		step = 10
	}
	for at := 0; ; at += step {
		fault := faults[next%len(faults)]
		next += 5
		objects := openBucket(t, "s3://"+server.Bucket(t), o)
		s := p.open(t, objects, "")
		one, two := words("a b c d e f"), words("a b c X e f")
		_, err := p.capture(t.Context(), s, "web", one)
		must(t, err)
		proxy.Plan(s3fault.At(at, fault))
		v, err1 := p.captureUntil(t.Context(), s, "web", two)
		_, err2 := s.GC(t.Context(), images.GCOptions{Grace: -1})
		_, err3 := s.GC(t.Context(), images.GCOptions{Grace: -1})
		fired := proxy.Fired()
		proxy.Plan(nil)
		if err := errors.Join(err1, err2, err3); err != nil {
			failed++
			if fired == 0 {
				t.Fatalf("without a fault: %v", err)
			}
		} else {
			fine++
		}
		if err1 == nil {
			mustRead(t, s, "web@"+v.Name.String(), two)
		}
		if _, err := p.captureUntil(t.Context(), s, "web", two); err != nil {
			t.Fatalf("request %d, %s: run again: %v", at, fault, err)
		}
		mustRead(t, s, "web", two)
		if r, err := s.Verify(t.Context(), images.VerifyOptions{ReadData: true}); err != nil || !r.Sound() {
			t.Fatalf("request %d, %s: %+v, %v", at, fault, r, err)
		}
		if fired == 0 {
			break
		}
	}
	t.Logf("%d times all went well, %d times an error was reported", fine, failed)
}
