package minioiam

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	v4 "github.com/aws/aws-sdk-go-v2/aws/signer/v4"
)

// Source is a MinIO that is asked for its users, and the access key that asks:
// one whose policy allows admin:ExportIAM.
type Source struct {
	URL       string // https://HOST[:PORT]; http for loopback alone, but for Plain
	Plain     bool   // http wherever it is
	AccessKey string
	Secret    string
	Region    string // MINIO_REGION of the server; default us-east-1
	CACert    []byte // PEM, of the authority of its certificate; default the system's
}

// String shows no secret.
func (s Source) String() string { return s.URL }

// GoString is String: %#v shows no secret either.
func (s Source) GoString() string { return s.String() }

// ErrDenied is that of a MinIO which does not let the access key export its
// users.
var ErrDenied = errors.New("the access key may not export MinIO's users: a policy of it must allow admin:ExportIAM")

// emptySum is the SHA-256 of nothing.
const emptySum = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"

// exportTime is how long an answer may take.
const exportTime = 30 * time.Second

// Check says what is wrong with a source, without asking it.
func (s *Source) Check() error {
	u, err := url.Parse(s.URL)
	if err != nil || u.Host == "" || u.User != nil || u.Scheme != "http" && u.Scheme != "https" || strings.Trim(u.Path, "/") != "" || u.RawQuery != "" || u.Fragment != "" {
		return errors.New("the url of MinIO is not https://HOST[:PORT]")
	}
	ip := net.ParseIP(u.Hostname())
	if u.Scheme == "http" && !s.Plain && u.Hostname() != "localhost" && (ip == nil || !ip.IsLoopback()) {
		return fmt.Errorf("%s is not https: the secrets of all users would cross the network in the clear", s.URL)
	}
	if s.AccessKey == "" || s.Secret == "" {
		return errors.New("it needs an access key and its secret to ask MinIO for its users")
	}
	if _, err := s.roots(); err != nil {
		return err
	}
	return nil
}

func (s *Source) roots() (*x509.CertPool, error) {
	if len(s.CACert) == 0 {
		return nil, nil
	}
	p := x509.NewCertPool()
	if !p.AppendCertsFromPEM(s.CACert) {
		return nil, errors.New("the file of MinIO's authority has no certificate in PEM")
	}
	return p, nil
}

// Keys asks for the export and reads it.
func (s *Source) Keys(ctx context.Context, now time.Time) ([]Key, error) {
	data, err := s.export(ctx, now)
	if err == nil {
		var keys []Key
		if keys, err = Read(data, now); err == nil {
			return keys, nil
		}
	}
	return nil, fmt.Errorf("users of the MinIO at %s: %w", s.URL, err)
}

func (s *Source) export(ctx context.Context, now time.Time) ([]byte, error) {
	if err := s.Check(); err != nil {
		return nil, err
	}
	roots, err := s.roots()
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, exportTime)
	defer cancel()
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, strings.TrimRight(s.URL, "/")+"/minio/admin/v3/export-iam", nil)
	if err != nil {
		return nil, err
	}
	region := s.Region
	if region == "" {
		region = "us-east-1"
	}
	r.Header.Set("X-Amz-Content-Sha256", emptySum)
	if err := v4.NewSigner().SignHTTP(ctx, aws.Credentials{AccessKeyID: s.AccessKey, SecretAccessKey: s.Secret}, r, emptySum, "s3", region, now); err != nil {
		return nil, err
	}
	transport := &http.Transport{Proxy: http.ProxyFromEnvironment, TLSClientConfig: &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: roots}, DisableCompression: true}
	defer transport.CloseIdleConnections()
	res, err := transport.RoundTrip(r) // which follows nobody elsewhere
	if err != nil {
		return nil, err
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		return nil, refused(res)
	}
	b, err := io.ReadAll(io.LimitReader(res.Body, MaxExport+1))
	if err == nil && len(b) > MaxExport {
		err = fmt.Errorf("%w: it has more than %d bytes", ErrExport, MaxExport)
	}
	return b, err
}

// refused says what MinIO answered instead: XML or JSON with a code.
func refused(res *http.Response) error {
	b, err := io.ReadAll(io.LimitReader(res.Body, 16<<10))
	if err != nil {
		return err
	}
	var e struct{ Code, Message string }
	if json.Unmarshal(b, &e) != nil && xml.Unmarshal(b, &e) != nil {
		e.Code = ""
	}
	switch {
	case res.StatusCode == http.StatusForbidden && (e.Code == "" || e.Code == "AccessDenied"):
		return ErrDenied
	case e.Code == "":
		return fmt.Errorf("it answers %s", res.Status)
	}
	return fmt.Errorf("it answers %s: %.100q %.200q", res.Status, e.Code, e.Message)
}
