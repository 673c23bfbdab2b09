package fetch

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/slotota/ota"
)

// Sentinel errors, for [errors.Is].
var (
	// ErrURL says that a URL is malformed.
	ErrURL error = &sentinel{"bad URL", ota.ErrInvalid}
	// ErrPolicy says that the policy does not allow a URL: its scheme or host.
	ErrPolicy = errors.New("not allowed")
	// ErrAddress says that the policy does not allow an address.
	ErrAddress = errors.New("address not allowed")
	// ErrRedirect says that a redirect was not followed. The error also wraps
	// the reason, if it is one of those above.
	ErrRedirect = errors.New("redirect refused")
	// ErrResponse says that the answer of the server is not understood.
	ErrResponse = errors.New("the answer is not the HTTP that was expected")
	// ErrNotModified says that there is nothing to do: the server knows that
	// the device runs what is at the URL (status 304).
	ErrNotModified = errors.New("not modified")
	// ErrChanged says that the file is not the one any more that was opened.
	ErrChanged error = &sentinel{"the file has changed", ota.ErrChanged}
	// ErrNoRanges says that a file can be read from its beginning only.
	ErrNoRanges error = &sentinel{"no ranges of bytes are to be had", ota.ErrUnsupported}
	// ErrStalled says that too few bytes came for too long.
	ErrStalled = errors.New("stalled")
	// ErrTooLarge says that a file is larger than allowed.
	ErrTooLarge error = &sentinel{"larger than allowed", ota.ErrTooLarge}
)

// StatusError is an answer that is neither the file nor ErrNotModified.
type StatusError struct {
	Code int // of the HTTP response
	// RetryAfter is how long the server wants to be left alone; 0 if it did
	// not say.
	RetryAfter time.Duration
}

// Error formats e; nothing in it is text of the server.
func (e *StatusError) Error() string {
	s := "the server answered " + strconv.Itoa(e.Code)
	if t := http.StatusText(e.Code); t != "" {
		s += " " + t
	}
	return s
}

// sentinel is an error value that is also another one.
type sentinel struct {
	text string
	is   error
}

func (s *sentinel) Error() string { return s.text }
func (s *sentinel) Unwrap() error { return s.is }

// because adds the particulars to a sentinel.
func because(sentinel error, format string, args ...any) error {
	return fmt.Errorf("%w: "+format, append([]any{sentinel}, args...)...)
}

func quote(s string) string { return ota.Quote(s) }

// Error says what could not be fetched, and why. Err is never nil.
type Error struct {
	// URL is the one that failed, which need not be the first one, without
	// user name, password, query and fragment: those may be secret. It is ""
	// if there is none.
	URL string
	Err error
}

// maxText bounds the text of an error, in bytes, without the URL.
const maxText = 256

// Error formats e on one line of ASCII characters; outside strings are quoted and
// cut.
func (e *Error) Error() string {
	if e.URL == "" {
		return "fetch: " + plain(e.Err.Error())
	}
	return "fetch: " + quote(e.URL) + ": " + plain(e.Err.Error())
}

// Unwrap returns e.Err.
func (e *Error) Unwrap() error { return e.Err }

// plain returns s cut, and with anything but printable ASCII replaced: below
// there are texts of the standard library that quote what a server sent.
func plain(s string) string {
	if len(s) > maxText {
		s = s[:maxText-3] + "..."
	}
	return strings.Map(func(r rune) rune {
		if r < ' ' || r > '~' {
			return '?'
		}
		return r
	}, s)
}

// clean returns u without what may be secret.
func clean(u *url.URL) string {
	if u == nil {
		return ""
	}
	c := url.URL{Scheme: u.Scheme, Host: u.Host, Path: u.Path, RawPath: u.RawPath}
	return c.String()
}

// Do is c.Do, but that errors are of type [*Error], and then there is no
// response. Their texts hold nothing of what the server answered: it may be a
// service that is not for the eyes of whoever chose the URL.
func Do(c *http.Client, r *http.Request) (*http.Response, error) {
	res, err := c.Do(r)
	if err == nil {
		return res, nil
	}
	if res != nil {
		res.Body.Close()
	}
	var e *Error
	if errors.As(err, &e) && e.URL != "" {
		return nil, e
	}
	e = &Error{URL: clean(r.URL), Err: err}
	var ue *url.Error
	if errors.As(err, &ue) {
		e.Err = ue.Err
		if u, err := url.Parse(ue.URL); err == nil && u.Host != "" {
			e.URL = clean(u)
		}
	}
	e.Err = safe(e.Err)
	return nil, e
}

// safe returns err, hidden in an ErrResponse if its text may hold something of an
// answer.
func safe(err error) error {
	if harmless(err) {
		return err
	}
	return &sentinel{ErrResponse.Error(), errors.Join(ErrResponse, err)}
}

// harmless reports whether the text of err is known to quote nothing that came
// in an answer. Those of net/http quote what they find malformed.
func harmless(err error) bool {
	for _, is := range []error{ErrURL, ErrPolicy, ErrAddress, ErrRedirect, ErrResponse, context.Canceled, context.DeadlineExceeded,
		io.EOF, io.ErrUnexpectedEOF, net.ErrClosed, http.ErrSchemeMismatch} {
		if errors.Is(err, is) {
			return true
		}
	}
	var (
		op    *net.OpError
		cert  *tls.CertificateVerificationError
		rec   tls.RecordHeaderError
		alert tls.AlertError
		late  net.Error
	)
	return errors.As(err, &op) || errors.As(err, &cert) || errors.As(err, &rec) || errors.As(err, &alert) ||
		errors.As(err, &late) && late.Timeout()
}
