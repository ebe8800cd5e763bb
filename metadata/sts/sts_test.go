package sts

import (
	"context"
	"encoding/pem"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/instar-image/instar/metadata"
)

const answer = `<AssumeRoleResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><AssumeRoleResult><Credentials>
<AccessKeyId>AKIA1</AccessKeyId><SecretAccessKey>secret1</SecretAccessKey><SessionToken>token1</SessionToken><Expiration>2030-01-02T03:04:05Z</Expiration>
</Credentials></AssumeRoleResult></AssumeRoleResponse>`

// TestMint pins what is asked: over TLS with the record's own authority, with
// the record's policy and duration, signed with the record's key.
func TestMint(t *testing.T) {
	var form url.Values
	var auth string
	srv := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if err := r.ParseForm(); err != nil {
			t.Error(err)
		}
		form, auth = r.PostForm, r.Header.Get("Authorization")
		fmt.Fprint(w, answer)
	}))
	defer srv.Close()
	secret := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(secret, []byte("parent-secret\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	s := &metadata.STS{
		Endpoint: srv.URL, Region: "eu-test-1", AccessKeyID: "PARENT", SecretFile: secret, Policy: `{"Version":"2012-10-17"}`,
		Duration: metadata.Duration(20 * time.Minute), CACert: string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw})),
	}
	k, err := Minter{}.Mint(context.Background(), s, "i/1 ü")
	if err != nil {
		t.Fatal(err)
	}
	if k != (metadata.StaticKeys{AccessKeyID: "AKIA1", SecretAccessKey: "secret1", Token: "token1", Expiration: time.Date(2030, 1, 2, 3, 4, 5, 0, time.UTC)}) {
		t.Errorf("got %+v", k)
	}
	for name, want := range map[string]string{"Action": "AssumeRole", "Version": "2011-06-15", "DurationSeconds": "1200", "Policy": s.Policy, "RoleSessionName": "i-1--"} {
		if got := form.Get(name); got != want {
			t.Errorf("%s is %q, want %q", name, got, want)
		}
	}
	if !strings.HasPrefix(auth, "AWS4-HMAC-SHA256 Credential=PARENT/") || !strings.Contains(auth, "/eu-test-1/sts/aws4_request") {
		t.Errorf("Authorization is %q", auth)
	}

	s.CACert = ""
	if _, err := (Minter{}).Mint(context.Background(), s, "i-1"); err == nil || !strings.Contains(err.Error(), srv.URL) {
		t.Errorf("without the authority: %v", err)
	}
	s.CACert = "nonsense"
	if _, err := (Minter{}).Mint(context.Background(), s, "i-1"); err == nil || !strings.Contains(err.Error(), "ca-cert") {
		t.Errorf("with a nonsensical authority: %v", err)
	}
	s.SecretFile += ".none"
	if _, err := (Minter{}).Mint(context.Background(), s, "i-1"); err == nil || !strings.Contains(err.Error(), ".none") {
		t.Errorf("without the secret's file: %v", err)
	}
}

func TestMintRefused(t *testing.T) {
	for _, body := range []string{`<ErrorResponse><Error><Code>AccessDenied</Code><Message>no</Message></Error></ErrorResponse>`, "nonsense", ""} {
		srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(http.StatusForbidden)
			fmt.Fprint(w, body)
		}))
		s := &metadata.STS{Endpoint: srv.URL, Region: "x", AccessKeyID: "a", SecretAccessKey: "the-secret"}
		_, err := Minter{}.Mint(context.Background(), s, "i-1")
		if err == nil || strings.Contains(err.Error(), "the-secret") {
			t.Errorf("%q: %v", body, err)
		}
		srv.Close()
	}
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprint(w, `<AssumeRoleResponse><AssumeRoleResult></AssumeRoleResult></AssumeRoleResponse>`)
	}))
	defer srv.Close()
	if _, err := (Minter{}).Mint(context.Background(), &metadata.STS{Endpoint: srv.URL, Region: "x", AccessKeyID: "a", SecretAccessKey: "b"}, "i-1"); err == nil {
		t.Error("an answer without credentials was taken")
	}
}
