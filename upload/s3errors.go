package upload

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"regexp"
	"strconv"
	"strings"
	"time"
	"unicode"

	smithy "github.com/aws/smithy-go"
	smithyhttp "github.com/aws/smithy-go/transport/http"
)

// codes says what S3's error codes mean to a caller and whether another attempt
// may help. A code that is not here goes by its HTTP status.
var codes = map[string]struct {
	kind  error
	retry bool
}{
	"NoSuchKey":                          {kind: ErrNotExist},
	"NoSuchVersion":                      {kind: ErrNotExist},
	"NoSuchBucket":                       {kind: ErrNoBucket},
	"PreconditionFailed":                 {kind: ErrExist},
	"ConditionalRequestConflict":         {kind: ErrExist, retry: true},
	"OperationAborted":                   {retry: true},
	"AccessDenied":                       {kind: ErrAccess},
	"AllAccessDisabled":                  {kind: ErrAccess},
	"AccountProblem":                     {kind: ErrAccess},
	"BucketAlreadyExists":                {kind: ErrAccess},
	"InvalidAccessKeyId":                 {kind: ErrCredentials},
	"SignatureDoesNotMatch":              {kind: ErrCredentials},
	"XAdminUserNotFound":                 {kind: ErrCredentials}, // versitygw
	"InvalidToken":                       {kind: ErrCredentials},
	"InvalidTokenId":                     {kind: ErrCredentials},
	"ExpiredToken":                       {kind: ErrCredentials},
	"TokenRefreshRequired":               {kind: ErrCredentials},
	"RequestTimeTooSkewed":               {kind: ErrClockSkew, retry: true},
	"RequestExpired":                     {kind: ErrClockSkew, retry: true},
	"AuthorizationHeaderMalformed":       {kind: ErrBucketElsewhere},
	"PermanentRedirect":                  {kind: ErrBucketElsewhere},
	"TemporaryRedirect":                  {kind: ErrBucketElsewhere, retry: true},
	"IllegalLocationConstraint":          {kind: ErrBucketElsewhere},
	"IllegalLocationConstraintException": {kind: ErrBucketElsewhere},
	"BucketNotEmpty":                     {kind: ErrNotEmpty},
	"AccessControlListNotSupported":      {kind: ErrACL},
	"EntityTooLarge":                     {kind: ErrTooLarge},
	"KeyTooLongError":                    {kind: ErrKey},
	"InvalidTag":                         {kind: ErrUnsupported},
	"XMinioInvalidObjectName":            {kind: ErrKey},
	"XMinioStorageFull":                  {kind: ErrNoSpace},
	"XMinioAdminBucketQuotaExceeded":     {kind: ErrNoSpace},
	"QuotaExceeded":                      {kind: ErrNoSpace},
	"InsufficientCapacity":               {kind: ErrNoSpace},
	"ObjectLocked":                       {kind: ErrLocked},
	"NotImplemented":                     {kind: ErrUnsupported},
	"MethodNotAllowed":                   {kind: ErrUnsupported},
	"BadDigest":                          {kind: ErrCorrupt, retry: true},
	"XAmzContentSHA256Mismatch":          {kind: ErrCorrupt, retry: true},
	"XAmzContentChecksumMismatch":        {kind: ErrCorrupt, retry: true},
	"IncompleteBody":                     {retry: true},
	"RequestTimeout":                     {retry: true},
	"SlowDown":                           {retry: true},
	"SlowDownRead":                       {retry: true},
	"SlowDownWrite":                      {retry: true},
	"Throttling":                         {retry: true},
	"ThrottlingException":                {retry: true},
	"InternalError":                      {retry: true},
	"ServiceUnavailable":                 {retry: true},
	"XMinioServerNotInitialized":         {retry: true},
}

var expectingRegion = regexp.MustCompile(`expecting '([A-Za-z0-9-]+)'`)

// classify makes an *Error of what the SDK returned.
func (s *s3Store) classify(ctx context.Context, op, key string, err error) *Error {
	var done *Error
	if errors.As(err, &done) {
		return done
	}
	e := newError(op, s.String(), key, nil, nil)
	var re *smithyhttp.ResponseError
	var api smithy.APIError
	hasReply := errors.As(err, &re) && re.Response != nil && re.Response.StatusCode != 0
	if hasReply {
		e.Status = re.Response.StatusCode
		h := re.Response.Header
		e.RequestID = printable(h.Get("X-Amz-Request-Id"))
		e.after = retryAfter(h.Get("Retry-After"))
		e.Location = printable(h.Get("X-Amz-Bucket-Region"))
	}
	if errors.As(err, &api) && !isStatusName(api.ErrorCode()) {
		e.Code, e.Message = printable(api.ErrorCode()), s.redact(printable(api.ErrorMessage()))
	}
	if hasReply && e.Status >= 300 || e.Code != "" {
		s.byReply(e, re)
		return e
	}
	return s.byTransport(ctx, e, err, hasReply)
}

// byReply judges an error the server sent.
func (s *s3Store) byReply(e *Error, re *smithyhttp.ResponseError) {
	c, known := codes[e.Code]
	e.Kind, e.retry = c.kind, c.retry
	switch {
	case known:
	case e.Status == http.StatusNotFound && e.Key == "":
		e.Kind = ErrNoBucket
	case e.Status == http.StatusNotFound:
		e.Kind = ErrNotExist
	case e.Status == http.StatusForbidden:
		e.Kind = ErrAccess
	case e.Status == http.StatusUnauthorized:
		e.Kind = ErrCredentials
	case e.Status == http.StatusPreconditionFailed:
		e.Kind = ErrExist
	case e.Status == http.StatusNotImplemented:
		e.Kind = ErrUnsupported
	case e.Status == http.StatusInsufficientStorage:
		e.Kind = ErrNoSpace
	case e.Status == http.StatusExpectationFailed, e.Status == http.StatusTooManyRequests, e.Status == http.StatusRequestTimeout, e.Status >= 500:
		e.retry = true
	case e.Status == http.StatusTemporaryRedirect:
		e.Kind, e.retry = ErrBucketElsewhere, true
	case e.Status >= 300 && e.Status < 400:
		e.Kind = ErrBucketElsewhere
	}
	if e.Status >= 500 && e.Kind != ErrUnsupported && e.Kind != ErrNoSpace {
		e.retry = true
	}
	e.unclear = e.Status >= 500 || e.Status == http.StatusRequestTimeout

	lower := strings.ToLower(e.Message)
	if strings.Contains(lower, "object lock") || strings.Contains(lower, "worm protected") || strings.Contains(lower, "object is locked") {
		e.Kind, e.retry = ErrLocked, false
	}
	switch e.Kind {
	case ErrBucketElsewhere:
		if m := expectingRegion.FindStringSubmatch(e.Message); m != nil {
			e.Location = m[1]
		}
		if e.Location == "" && re != nil && re.Response != nil {
			if u, err := url.Parse(re.Response.Header.Get("Location")); err == nil && u.Host != "" {
				e.Location = printable(u.Scheme + "://" + u.Host)
			}
		}
		e.Advice = "set the region or endpoint to where it is"
	case ErrClockSkew:
		_, date, seen := s.server.get()
		if !date.IsZero() {
			e.Message += fmt.Sprintf(" (this clock is %v off)", seen.Sub(date).Round(time.Second))
		}
		e.Advice = "set this machine's clock"
	case ErrACL:
		e.Advice = "put without an ACL and grant access by a bucket policy"
	default:
		e.Location = ""
	}
}

// byTransport judges a request that got no usable reply.
func (s *s3Store) byTransport(ctx context.Context, e *Error, err error, hasReply bool) *Error {
	cause := context.Cause(ctx)
	if cause != nil && !errors.Is(err, errStalled) {
		e.Err = cause
		e.unclear = true
		return e
	}
	e.Err = innermost(err)
	e.unclear = true
	var unknown x509.UnknownAuthorityError
	var host x509.HostnameError
	var invalid x509.CertificateInvalidError
	var verify *tls.CertificateVerificationError
	var record tls.RecordHeaderError
	var dns *net.DNSError
	switch {
	case errors.As(err, &host):
		e.Kind = ErrUnreachable
		e.Advice = fmt.Sprintf("the endpoint says %s: use a name the certificate is for", host.Host)
	case errors.As(err, &unknown), errors.As(err, &invalid), errors.As(err, &verify):
		e.Kind = ErrUnreachable
		e.Advice = "name the authority that signed the server's certificate with --ca-cert or AWS_CA_BUNDLE"
	case errors.As(err, &record), strings.Contains(err.Error(), "server gave HTTP response to HTTPS client"):
		e.Kind = ErrUnreachable
		e.Advice = "the server speaks plain HTTP: the endpoint should begin with http://"
	case errors.As(err, &dns):
		e.Kind = ErrUnreachable
		e.retry = !dns.IsNotFound
		e.Advice = "check the endpoint and region"
	case hasReply:
		e.retry = true // a reply that could not be understood
	default:
		e.Kind = ErrUnreachable
		e.retry = true
	}
	return e
}

// innermost strips the SDK's and net/http's wrapping, which repeats the URL.
func innermost(err error) error {
	var ue *url.Error
	if errors.As(err, &ue) {
		return ue.Err
	}
	var rs *smithyhttp.RequestSendError
	if errors.As(err, &rs) {
		return rs.Err
	}
	var oe *smithy.OperationError
	for errors.As(err, &oe) {
		err = oe.Err
	}
	if errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("reply broke off: %w", io.ErrUnexpectedEOF)
	}
	return err
}

// isStatusName recognises the codes the SDK makes up for replies without a body.
func isStatusName(code string) bool {
	switch code {
	case "", "NotFound", "Forbidden", "BadRequest", "UnknownError", "PreconditionFailed":
		return code != "PreconditionFailed"
	}
	return code == http.StatusText(0) || strings.Contains(code, " ")
}

// redact removes what a server quotes of our secrets.
func (s *s3Store) redact(text string) string {
	if c := s.opt.Credentials; c != nil {
		for _, secret := range []string{c.SecretAccessKey, c.SessionToken} {
			if secret != "" {
				text = strings.ReplaceAll(text, secret, "…")
			}
		}
	}
	return text
}

// printable keeps a server's text on one line and of bounded length.
func printable(t string) string {
	t = strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return ' '
		}
		return r
	}, strings.ToValidUTF8(t, "?"))
	if r := []rune(t); len(r) > 500 {
		t = string(r[:500]) + "…"
	}
	return strings.TrimSpace(t)
}

func retryAfter(h string) time.Duration {
	if h == "" {
		return 0
	}
	if n, err := strconv.Atoi(strings.TrimSpace(h)); err == nil && n >= 0 {
		return time.Duration(min(n, 3600)) * time.Second
	}
	if t, err := http.ParseTime(h); err == nil {
		return max(0, time.Until(t))
	}
	return 0
}

// plainETag removes the quotes.
func plainETag(p *string) string {
	if p == nil {
		return ""
	}
	return strings.Trim(strings.TrimPrefix(*p, "W/"), `"`)
}

// etagMD5 is the MD5 an ETag of a simple, unencrypted object is.
func etagMD5(etag string) []byte {
	if len(etag) != 32 {
		return nil
	}
	b, err := hex.DecodeString(etag)
	if err != nil {
		return nil
	}
	return b
}
