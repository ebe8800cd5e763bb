package imds_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/instar-image/instar/metadata/imds"
)

var tree = map[string]string{
	"ami-id": "ami-2", "ancestor-ami-ids": "ami-0\nami-1", "kernel-id": "aki-1", "product-codes": "A\nB\n",
	"block-device-mapping/": "root\nami", "block-device-mapping/root": "/dev/sda1", "block-device-mapping/ami": "sda1",
}

// service answers like the real one; tokens: "required", "unknown" (as the
// service was before 2019) or "broken".
func service(t *testing.T, tokens string) *imds.Client {
	t.Helper()
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.Method == http.MethodPut && r.URL.Path == "/latest/api/token":
			switch {
			case tokens == "unknown":
				http.Error(w, "", http.StatusMethodNotAllowed)
			case tokens == "broken":
				http.Error(w, "", http.StatusInternalServerError)
			case r.Header.Get("X-aws-ec2-metadata-token-ttl-seconds") == "":
				http.Error(w, "", http.StatusBadRequest)
			default:
				fmt.Fprint(w, "the-token")
			}
		case tokens == "required" && r.Header.Get("X-aws-ec2-metadata-token") != "the-token":
			http.Error(w, "", http.StatusUnauthorized)
		default:
			v, ok := tree[strings.TrimPrefix(r.URL.Path, "/latest/meta-data/")]
			if !ok {
				http.NotFound(w, r)
				return
			}
			fmt.Fprint(w, v)
		}
	}))
	t.Cleanup(s.Close)
	c, err := imds.New(imds.Options{Endpoint: s.URL + "/"})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestAncestry(t *testing.T) {
	want := imds.Ancestry{
		Ancestors: []string{"ami-0", "ami-1", "ami-2"}, KernelID: "aki-1", ProductCodes: []string{"A", "B"},
		Mappings: []imds.Mapping{{Virtual: "ami", Device: "sda1"}, {Virtual: "root", Device: "/dev/sda1"}}, Missing: []string{"ramdisk-id"},
	}
	for _, tokens := range []string{"required", "unknown"} {
		got, err := service(t, tokens).Ancestry(t.Context())
		if err != nil {
			t.Fatalf("tokens %s: %v", tokens, err)
		}
		if d := cmp.Diff(want, got); d != "" {
			t.Errorf("tokens %s (-want +got):\n%s", tokens, d)
		}
	}
}

func TestNoDowngradeOnFailure(t *testing.T) {
	if _, err := service(t, "broken").Get(t.Context(), "ami-id"); !errors.Is(err, imds.ErrRefused) {
		t.Errorf("a failing token request gives %v, want ErrRefused", err)
	}
}

func TestSilence(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close() // accepts by backlog, never answers
	c, err := imds.New(imds.Options{Endpoint: "http://" + l.Addr().String()})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	_, err = c.Ancestry(ctx)
	if !errors.Is(err, imds.ErrUnreachable) || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("silence gives %v, want ErrUnreachable after the deadline", err)
	}
}

func TestEndpointRefused(t *testing.T) {
	for _, e := range []string{"169.254.169.254", "ftp://x", "http://", "::"} {
		if _, err := imds.New(imds.Options{Endpoint: e}); err == nil {
			t.Errorf("endpoint %q was taken", e)
		}
	}
}
