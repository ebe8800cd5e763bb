package imds

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/instar-image/instar/bundle/ec2"
	"github.com/instar-image/instar/metadata/ticket"
	"github.com/instar-image/instar/test/freeport"
	"github.com/instar-image/instar/test/selfsigned"
	"github.com/instar-image/instar/test/servers"
)

func indent(s string) string {
	return "    " + strings.ReplaceAll(strings.TrimSpace(s), "\n", "\n    ")
}

func writeFile(t *testing.T, name string, b []byte) string {
	t.Helper()
	p := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(p, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return p
}

type minioSink struct {
	t      *testing.T
	s      *servers.Server
	bucket string
}

func (m minioSink) PutPart(_ context.Context, p ec2.Part) error {
	m.s.Put(m.t, m.bucket, "images/"+p.Name, bytes.Clone(p.Data))
	return nil
}

// TestLaunchFromMinIO claims a ticket for a bundle in MinIO over TLS with its
// own authority, fetches manifest and parts by the ticket's URLs alone, and
// completes it; the state outlives a kill of the server.
func TestLaunchFromMinIO(t *testing.T) {
	minio := servers.MinIOTLS(t)
	bucket := minio.Bucket(t)
	userKey, userCert := selfsigned.New(t)
	cloudKey, cloudCert := selfsigned.New(t)
	var key, iv ec2.BlockKey
	rand.Read(key[:])
	rand.Read(iv[:])
	m, manifest, err := ec2.Bundle(context.Background(), ec2.BundleOptions{Arch: "x86_64", Account: "123456789012", EC2Cert: cloudCert, UserCert: userCert, Key: userKey, EncKey: &key, EncIV: &iv},
		ec2.Image{Name: "web", Size: 1 << 20, Write: func(_ context.Context, w io.Writer) error { _, err := w.Write(make([]byte, 1<<20)); return err }}, minioSink{t, minio, bucket})
	if err != nil {
		t.Fatal(err)
	}
	minio.Put(t, bucket, "images/web.manifest.xml", manifest)
	ca, err := os.ReadFile(minio.CACert)
	if err != nil {
		t.Fatal(err)
	}
	cloudDER, err := x509.MarshalPKCS8PrivateKey(cloudKey)
	if err != nil {
		t.Fatal(err)
	}
	cloudFile := writeFile(t, "cloud.pem", pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: cloudDER}))
	record := fmt.Sprintf(`
instance-id: i-launch
caller: {addresses: [127.0.0.1]}
launch:
  format: ec2
  store: s3://%s/images
  endpoint: %s
  region: %s
  manifest: web.manifest.xml
  ca-cert: |
%s
  certificate: |
%s
  credentials:
    static: {access-key-id: %s, secret-access-key: %s}
`, bucket, minio.Endpoint, minio.Region, indent(string(ca)), indent(selfsigned.PEM(userCert)), minio.AccessKey, minio.SecretKey)
	addr := freeport.Address(freeport.Port(t))
	args := []string{"--listen", addr, "--ec2-key", cloudFile}
	s := serve(t, netns{}, map[string]string{"a.yaml": record}, args...)
	c, err := ticket.New("http://"+addr, ticket.Options{})
	if err != nil {
		t.Fatal(err)
	}
	got, err := c.Claim(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	if got.Key != hex.EncodeToString(key[:]) || got.IV != hex.EncodeToString(iv[:]) || got.CACert == "" || len(got.Objects) != 1+len(m.Parts) {
		t.Errorf("the ticket is %+v", *got)
	}
	client := minio.Client(t)
	for name, u := range got.Objects {
		res, err := client.Get(u)
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(res.Body)
		res.Body.Close()
		if err != nil || res.StatusCode != http.StatusOK || !bytes.Equal(b, minio.Get(t, bucket, "images/"+name)) {
			t.Errorf("%s by its URL: %d, %v", name, res.StatusCode, err)
		}
	}
	if err := s.cmd.Process.Signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	s.cmd.Wait()
	s.start(t, args...)
	if out := s.ctl(t, "list"); !strings.Contains(out, "claimed") {
		t.Errorf("after a kill: %s", out)
	}
	if err := c.Complete(context.Background()); err != nil { // with a new token: the old key is gone
		t.Error(err)
	}
	if _, err := c.Claim(context.Background()); err == nil {
		t.Error("a completed ticket was renewed")
	}
	if log := s.log(t, "launch: completed"); !strings.Contains(log, "launch: completed") || strings.Contains(log, got.Key) || strings.Contains(log, minio.SecretKey) {
		t.Error("the access log lacks the ticket's end or holds a secret")
	}
}

// TestMinIOSTS has MinIO mint an instance's credentials, and uses them.
func TestMinIOSTS(t *testing.T) {
	minio := servers.MinIO(t)
	bucket := minio.Bucket(t)
	minio.Put(t, bucket, "allowed/x", []byte("content"))
	minio.Put(t, bucket, "other/x", []byte("secret"))
	policy := `{"Version":"2012-10-17","Statement":[{"Effect":"Allow","Action":["s3:GetObject"],"Resource":["arn:aws:s3:::` + bucket + `/allowed/*"]}]}`
	record := fmt.Sprintf("instance-id: i-1\ncaller: {addresses: [127.0.0.1]}\nrole:\n  name: web\n  sts:\n    endpoint: %s\n    access-key-id: %s\n    secret-access-key: %s\n    duration: 20m\n    policy: '%s'\n",
		minio.Endpoint, minio.AccessKey, minio.SecretKey, policy)
	addr := freeport.Address(freeport.Port(t))
	serve(t, netns{}, map[string]string{"a.yaml": record}, "--listen", addr)
	here := netns{}
	const path = "/latest/meta-data/iam/security-credentials/web"
	status, body, _ := strings.Cut(here.curl(t, "http://"+addr+path), " ")
	var keys struct {
		Code, AccessKeyId, SecretAccessKey, Token string
		Expiration                                time.Time
	}
	if err := json.Unmarshal([]byte(body), &keys); err != nil || status != "200" || keys.Code != "Success" {
		t.Fatalf("credentials: %s %s", status, body)
	}
	if left := time.Until(keys.Expiration); left < 19*time.Minute || left > 21*time.Minute || keys.AccessKeyId == minio.AccessKey {
		t.Errorf("the keys are %s until %s", keys.AccessKeyId, keys.Expiration)
	}
	if again := here.curl(t, "http://"+addr+path); again != "200 "+body {
		t.Error("keys were minted twice")
	}
	for object, want := range map[string]string{"allowed/x": "200 content", "other/x": "403"} {
		got := here.curl(t, "--aws-sigv4", "aws:amz:"+minio.Region+":s3", "--user", keys.AccessKeyId+":"+keys.SecretAccessKey, "-H", "x-amz-security-token: "+keys.Token, "-H", "x-amz-content-sha256: UNSIGNED-PAYLOAD", minio.Endpoint+"/"+bucket+"/"+object)
		if !strings.HasPrefix(got, want) {
			t.Errorf("%s with the instance's keys: %q, want %q", object, got, want)
		}
	}
}
