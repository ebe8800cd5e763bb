package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"reflect"
	"regexp"
	"runtime/debug"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	v4 "github.com/aws/aws-sdk-go-v2/aws/signer/v4"
)

// line is a request of the record, one JSON object.
type line struct {
	At      time.Time         `json:"at"`     // when it was sent, by the clock both sides had
	Region  string            `json:"region"` // whose server it was sent to
	Action  string            `json:"action"`
	Method  string            `json:"method"`
	Path    string            `json:"path"`    // and query
	Headers map[string]string `json:"headers"` // those that are signed, and Authorization
	Body    string            `json:"body,omitempty"`

	Made   string `json:"made,omitempty"`   // id that the answer has of what was made
	Lost   bool   `json:"lost,omitempty"`   // the SDK did not get the answer
	Waited bool   `json:"waited,omitempty"` // a waiter's last: it may take a while until this is answered
	Status int    `json:"status"`           // of the answer
	Code   string `json:"code,omitempty"`   // what the SDK's error had
	Output any    `json:"output,omitempty"` // the SDK's typed answer
}

// wire is a caller's way to the server: it records what passes, and can lose
// answers and show another time. As the SDK's signer it signs for that time.
type wire struct {
	d      *driver
	region string
	client *http.Client
	action string

	lose int           // answers, the next ones
	slow time.Duration // how far the machine's clock is behind
}

var errLost = errors.New("the connection was closed before the answer came")

// madeID finds the id in the answer to a request that makes something.
var madeID = regexp.MustCompile(`<(?:imageId|keyPairId|bundleId)>((?:ami|aki|ari|key|bun)-[0-9a-f]{17})<`)

// Do sends a request.
func (w *wire) Do(r *http.Request) (*http.Response, error) {
	l := &line{At: time.Now().UTC(), Region: w.region, Action: w.action, Method: r.Method, Path: r.URL.RequestURI(), Headers: map[string]string{}}
	var body []byte
	if r.Body != nil {
		var err error
		if body, err = io.ReadAll(r.Body); err != nil {
			return nil, err
		}
		r.Body.Close()
		r.Body = io.NopCloser(bytes.NewReader(body))
	}
	l.Body = string(body)
	host := r.Host
	if host == "" {
		host = r.URL.Host
	}
	l.Headers["Host"] = host
	for name, v := range r.Header {
		if name != "User-Agent" && name != "Accept-Encoding" {
			l.Headers[name] = strings.Join(v, ",")
		}
	}
	answer, err := w.client.Do(r)
	if err != nil {
		return nil, err
	}
	data, err := io.ReadAll(answer.Body)
	answer.Body.Close()
	if err != nil {
		return nil, err
	}
	answer.Body = io.NopCloser(bytes.NewReader(data))
	l.Status = answer.StatusCode
	if m := madeID.FindSubmatch(data); m != nil && answer.StatusCode == http.StatusOK && !strings.HasPrefix(l.Action, "De") {
		l.Made = string(m[1])
	}
	w.d.lines = append(w.d.lines, l)
	if w.lose > 0 {
		w.lose--
		l.Lost = true
		return nil, errLost
	}
	// A machine whose clock is behind finds the server's ahead.
	if date, err := http.ParseTime(answer.Header.Get("Date")); err == nil && w.slow != 0 {
		answer.Header.Set("Date", date.Add(w.slow).UTC().Format(http.TimeFormat))
	}
	return answer, nil
}

// SignHTTP signs as the SDK does, for the time that the machine's clock shows.
func (w *wire) SignHTTP(ctx context.Context, c aws.Credentials, r *http.Request, hash, service, region string, at time.Time, o ...func(*v4.SignerOptions)) error {
	return v4.NewSigner().SignHTTP(ctx, c, r, hash, service, region, at.Add(-w.slow), o...)
}

// typed is a typed answer as JSON has it: what the SDK left nil, and enumerations
// it left empty, are not there.
func typed(out any) any {
	v := plain(reflect.ValueOf(out).Elem())
	if m, ok := v.(map[string]any); ok && len(m) == 0 {
		return nil
	}
	return v
}

func plain(v reflect.Value) any {
	switch v.Kind() {
	case reflect.Pointer:
		if v.IsNil() {
			return nil
		}
		if v.Elem().Kind() == reflect.String {
			return v.Elem().String() // also if it is empty
		}
		return plain(v.Elem())
	case reflect.Slice:
		if v.IsNil() {
			return nil
		}
		l := make([]any, v.Len())
		for i := range l {
			l[i] = plain(v.Index(i))
		}
		return l
	case reflect.Struct:
		if at, ok := v.Interface().(time.Time); ok {
			return at.UTC().Format(time.RFC3339Nano)
		}
		m := map[string]any{}
		for i := range v.NumField() {
			f := v.Type().Field(i)
			if !f.IsExported() || f.Name == "ResultMetadata" {
				continue
			}
			p := plain(v.Field(i))
			if f.Name == "KeyMaterial" && p != nil { // a private key is nobody's record
				p, _, _ = strings.Cut(p.(string), "\n")
			}
			if p != nil {
				m[f.Name] = p
			}
		}
		return m
	case reflect.String:
		if v.String() == "" {
			return nil
		}
		return v.String()
	case reflect.Bool:
		return v.Bool()
	case reflect.Int, reflect.Int32, reflect.Int64:
		return v.Int()
	}
	panic("catalogsdk: an answer has a field of type " + v.Type().String())
}

// sdk is the module that is driven.
const sdk = "github.com/aws/aws-sdk-go-v2/service/ec2"

// version is that of a module this program is made of.
func version(module string) string {
	info, _ := debug.ReadBuildInfo()
	for _, m := range info.Deps {
		if m.Path == module {
			return m.Version
		}
	}
	return ""
}

// save writes the record: a line that says of which SDK, and one a request.
func (d *driver) save(name string) error {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	if err := e.Encode(map[string]string{"sdk": sdk, "version": version(sdk)}); err != nil {
		return fmt.Errorf("the record: %w", err)
	}
	for _, l := range d.lines {
		if err := e.Encode(l); err != nil {
			return fmt.Errorf("the record: %w", err)
		}
	}
	return os.WriteFile(name, b.Bytes(), 0o644)
}
