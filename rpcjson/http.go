package rpcjson

import (
	"errors"
	"fmt"
	"io"
	"mime"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/slotota/ota"
)

// Time limits of one HTTP exchange, without the call between them.
const (
	readTimeout  = 20 * time.Second // of a body
	writeTimeout = 30 * time.Second // of an answer
)

// ServeHTTP serves calls over HTTP:
//
//	POST /rpc          the body is a frame, the answer is the reply
//	POST /rpc/METHOD   the body is the parameters, the answer is the bare result
//	GET  /rpc/METHOD   the query is the parameters, values being JSON
//	OPTIONS            answered 200 and empty
//
// Frames may also be posted to / and /rpc/. A frame is answered 200, also for an
// error, except that missing credentials are answered 401; a frame that wants no
// reply is answered 204. A bare call that fails is answered with the error object
// and status 401, 403 or 404 if that is the code, 503 if too many calls are being
// served, else 500. A call that outlasts the context of the request is answered
// 503, although it may go on. (mongoose-os-libs/rpc-common,
// src/mg_rpc_channel_http.c.)
//
// A web page must not be able to change anything: the Host must be an address,
// localhost or in AllowHosts, and Origin and Sec-Fetch-Site must not be foreign
// (403), a POST must have the Content-Type application/json (415), and GET is
// refused for methods that need more than Read (405), but see AllowGET of
// [Options]. What a page can do is to cause a GET of the others; it does not get
// to see the answer, as no CORS header is ever sent.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	h := setHeaders(w)
	if r.ProtoMajor == 1 {
		// One connection per call, as the original, unless asked otherwise.
		if strings.EqualFold(r.Header.Get("Connection"), "keep-alive") {
			h.Set("Connection", "keep-alive")
		} else {
			h.Set("Connection", "close")
		}
	}
	if e := s.checkBrowser(r); e != nil {
		s.deny(w, r, e)
		return
	}
	if !s.o.NoAuth {
		if e := s.limits.blocked(httpPeer(r).key()); e != nil { // before anything is read
			s.answerError(w, e.Code, e)
			return
		}
	}
	name, ok := strings.CutPrefix(r.URL.Path, "/rpc/")
	if !ok && r.URL.Path != "/rpc" && r.URL.Path != "/" {
		s.answerError(w, http.StatusNotFound, errorf(404, "no such path"))
		return
	}
	if !ok {
		name = ""
	}
	switch {
	case r.Method == http.MethodOptions:
		s.answer(w, http.StatusOK, nil)
	case r.Method == http.MethodPost:
		s.servePost(w, r, name)
	case r.Method == http.MethodGet && name != "":
		s.serveGet(w, r, name)
	default:
		s.refuseMethod(w)
	}
}

func setHeaders(w http.ResponseWriter) http.Header {
	h := w.Header()
	h.Set("Content-Type", "application/json")
	h.Set("Cache-Control", "no-store")
	h.Set("X-Content-Type-Options", "nosniff")
	return h
}

func (s *Server) deny(w http.ResponseWriter, r *http.Request, e *Error) {
	s.log.Warn("rpc denied", "channel", "HTTP", "peer", r.RemoteAddr, "err", e)
	s.answerError(w, e.Code, e)
}

func (s *Server) refuseMethod(w http.ResponseWriter) {
	w.Header().Set("Allow", "POST, OPTIONS")
	s.answerError(w, http.StatusMethodNotAllowed, errorf(405, "use POST"))
}

// checkBrowser returns the error to be answered if a web page that is none of
// this device's could have caused r.
func (s *Server) checkBrowser(r *http.Request) *Error {
	if !s.hostAllowed(r.Host) {
		return errorf(403, "Host %s is not allowed here", ota.Quote(r.Host))
	}
	foreign := false // allowed, but foreign
	switch o := r.Header.Values("Origin"); {
	case len(o) == 0:
	case len(o) > 1:
		return errorf(403, "more than one Origin")
	case s.originAllowed(o[0]):
		foreign = true
	case !sameOrigin(o[0], r):
		return errorf(403, "Origin %s is not allowed", ota.Quote(o[0]))
	}
	for _, site := range r.Header.Values("Sec-Fetch-Site") {
		if site != "same-origin" && site != "none" && !foreign {
			return errorf(403, "Sec-Fetch-Site %s is not allowed", ota.Quote(site))
		}
	}
	return nil
}

// originAllowed reports whether origin is one of AllowOrigins.
func (s *Server) originAllowed(origin string) bool {
	return slices.ContainsFunc(s.o.AllowOrigins, func(a string) bool {
		return strings.EqualFold(strings.TrimSuffix(a, "/"), strings.TrimSuffix(origin, "/"))
	})
}

// checkReferer returns the error to be answered if r says that it was caused by a
// page that is none of this device's. That is all that can tell with a GET over
// plain HTTP, and a page may leave it out.
func (s *Server) checkReferer(r *http.Request) *Error {
	for _, ref := range r.Header.Values("Referer") {
		u, err := url.Parse(ref)
		if err != nil || !s.originAllowed(u.Scheme+"://"+u.Host) && !sameOrigin(u.Scheme+"://"+u.Host, r) {
			return errorf(403, "Referer %s is not allowed", ota.Quote(ref))
		}
	}
	return nil
}

// hostAllowed reports whether a Host header names this device in a way that no
// foreign name server can have arranged.
func (s *Server) hostAllowed(hostport string) bool {
	host := strings.ToLower(hostport)
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	} else {
		host = strings.TrimSuffix(strings.TrimPrefix(host, "["), "]")
	}
	if _, err := netip.ParseAddr(host); err == nil {
		return true
	}
	host = strings.TrimSuffix(host, ".")
	return host == "localhost" || host != "" && slices.ContainsFunc(s.o.AllowHosts, func(a string) bool {
		return strings.EqualFold(strings.TrimSuffix(a, "."), host)
	})
}

// sameOrigin reports whether origin is the one that r was sent to.
func sameOrigin(origin string, r *http.Request) bool {
	u, err := url.Parse(origin)
	if err != nil || u.Host == "" || u.Path != "" || u.User != nil {
		return false
	}
	// Without TLS here there may be a proxy that has it.
	if u.Scheme != "https" && (u.Scheme != "http" || r.TLS != nil) {
		return false
	}
	return strings.EqualFold(u.Host, r.Host)
}

func (s *Server) servePost(w http.ResponseWriter, r *http.Request, name string) {
	if t, _, err := mime.ParseMediaType(r.Header.Get("Content-Type")); err != nil || t != "application/json" {
		s.answerError(w, http.StatusUnsupportedMediaType, errorf(415, "need the header Content-Type: application/json"))
		return
	}
	body, e := s.readBody(w, r)
	defer func() { s.bodies.Put(body) }()
	if e != nil {
		s.answerError(w, e.Code, e)
		return
	}
	if name != "" {
		f := frame{method: name}
		f.params, f.paramsErr = parseParams(body, s.o.MaxDepth)
		s.serveBare(w, r, &f)
		return
	}
	f, err := s.parse(body)
	if err != nil {
		s.log.Debug("rpc", "channel", "HTTP", "peer", r.RemoteAddr, "err", err)
		w.Header().Set("Content-Type", "text/plain")
		s.write(w, http.StatusBadRequest, []byte("Invalid request"))
		return
	}
	if f.method == "" {
		s.write(w, http.StatusNoContent, nil)
		return
	}
	result, after, callErr, err := s.callHTTP(w, r, &f)
	if err != nil {
		s.unanswered(w, err)
		return
	}
	switch {
	case callErr != nil && callErr.Code == http.StatusUnauthorized:
		s.answerError(w, callErr.Code, callErr)
	case f.id == "":
		s.write(w, http.StatusNoContent, nil)
	default:
		s.answer(w, http.StatusOK, appendReply(nil, &f, s.o.ID, result, callErr))
	}
	if after != nil {
		after()
	}
}

// getAllowed returns the error to be answered if a method may not be called by GET.
func (s *Server) getAllowed(r *http.Request, name string) *Error {
	m := s.method(name)
	switch {
	case m == nil || m.right == Read:
		return nil
	case !slices.ContainsFunc(s.o.AllowGET, func(a string) bool { return strings.EqualFold(a, m.name) }):
		return errorf(405, "use POST")
	}
	return s.checkReferer(r)
}

func (s *Server) serveGet(w http.ResponseWriter, r *http.Request, name string) {
	switch e := s.getAllowed(r, name); {
	case e == nil:
	case e.Code == http.StatusMethodNotAllowed:
		s.refuseMethod(w)
		return
	default:
		s.deny(w, r, e)
		return
	}
	f := frame{method: name}
	if len(r.URL.RawQuery) > s.o.MaxFrame {
		s.answerError(w, http.StatusRequestURITooLong, errorf(414, "query of %d bytes, at most %d", len(r.URL.RawQuery), s.o.MaxFrame))
		return
	}
	params, err := queryParams(r.URL.RawQuery, s.o.MaxDepth)
	f.params, f.paramsErr = token{kindObject, params}, err
	s.serveBare(w, r, &f)
}

// queryParams makes an object of the parameters of a query. In the original the
// values are pasted into it unchecked.
func queryParams(query string, depth int) ([]byte, error) {
	b := []byte{'{'}
	for query != "" {
		var pair string
		pair, query, _ = strings.Cut(query, "&")
		if pair == "" {
			continue
		}
		k, v, _ := strings.Cut(pair, "=")
		key, err := url.QueryUnescape(k)
		if err != nil {
			return nil, errors.New("name: bad % escape")
		}
		val, err := url.QueryUnescape(v)
		if err != nil {
			return nil, fmt.Errorf("%s: bad %% escape", printable(key))
		}
		sc := scanner{b: []byte(val), depth: depth}
		if _, err := sc.value(); err != nil || sc.peek() != 0 || sc.i != len(val) {
			return nil, fmt.Errorf(`%s: need a JSON value (a string in quotes: %%22...%%22), got %s`, printable(key), ota.Quote(val))
		}
		if len(b) > 1 {
			b = append(b, ',')
		}
		b = appendString(b, key)
		b = append(b, ':')
		b = append(b, val...)
	}
	return append(b, '}'), nil
}

// serveBare serves a call whose answer is the result alone.
func (s *Server) serveBare(w http.ResponseWriter, r *http.Request, f *frame) {
	result, after, callErr, err := s.callHTTP(w, r, f)
	switch {
	case err != nil:
		s.unanswered(w, err)
		return
	case callErr == nil:
		s.answer(w, http.StatusOK, result)
	default:
		status := http.StatusInternalServerError
		switch callErr.Code {
		case http.StatusUnauthorized, http.StatusForbidden, http.StatusNotFound:
			status = callErr.Code
		case errOverflow.Code:
			status = http.StatusServiceUnavailable
		}
		s.answerError(w, status, callErr)
	}
	if after != nil {
		after()
	}
}

func (s *Server) callHTTP(w http.ResponseWriter, r *http.Request, f *frame) (result []byte, after func(), callErr *Error, err error) {
	if !s.acquire() {
		return nil, nil, errOverflow, nil
	}
	// The request has come; a time limit for it would cut a long call short.
	_ = http.NewResponseController(w).SetReadDeadline(time.Time{})
	return s.call(r.Context(), httpPeer(r), f)
}

func httpPeer(r *http.Request) *Peer {
	return &Peer{Channel: "HTTP", Addr: r.RemoteAddr, Request: r}
}

// unanswered ends an exchange whose call has no outcome: the client has gone, the
// context of the request has ended for another reason, or the server is closed.
func (s *Server) unanswered(w http.ResponseWriter, err error) {
	text := "the call was given up; it may still be going on"
	if errors.Is(err, ErrClosed) {
		text = "shutting down"
	}
	s.answerError(w, http.StatusServiceUnavailable, errorf(503, "%s", text))
}

// readBody reads the body of r within limits of size, number and time.
func (s *Server) readBody(w http.ResponseWriter, r *http.Request) ([]byte, *Error) {
	if r.ContentLength == 0 {
		return nil, nil
	}
	// Also for what net/http reads of it after an error. Servers without
	// deadlines (tests, other protocols) have their own.
	_ = http.NewResponseController(w).SetReadDeadline(time.Now().Add(readTimeout))
	limit := int64(s.o.MaxFrame)
	if r.ContentLength > limit {
		return nil, errorf(413, "body of %d bytes, at most %d", r.ContentLength, limit)
	}
	select {
	case s.reading <- struct{}{}:
		defer func() { <-s.reading }()
	default:
		w.Header().Set("Retry-After", "1")
		return nil, errorf(503, "%s", errOverflow.Message)
	}
	b := s.bodies.Get(int(max(512, r.ContentLength+1))) // within limit
	for {
		n, err := r.Body.Read(b[len(b):min(int64(cap(b)), limit+1)])
		b = b[:len(b)+n]
		switch {
		case int64(len(b)) > limit:
			return nil, errorf(413, "body of more than %d bytes", limit)
		case err == io.EOF:
			return b, nil
		case err != nil:
			return nil, errorf(400, "the body ended early")
		case len(b) == cap(b):
			b = slices.Grow(b, len(b))
		}
	}
}

// answer sends a JSON body with the line end that the original has.
func (s *Server) answer(w http.ResponseWriter, status int, body []byte) {
	if body != nil {
		body = append(body, "\r\n"...)
	}
	s.write(w, status, body)
}

func (s *Server) answerError(w http.ResponseWriter, status int, e *Error) {
	body := appendError(nil, e)
	for c := range strings.SplitSeq(e.challenges, "\n") {
		if c == "" {
			break
		}
		w.Header().Add("WWW-Authenticate", c)
		if strings.HasPrefix(c, "Digest ") { // the original sends no body then
			body = nil
		}
	}
	if status == http.StatusTooManyRequests {
		w.Header().Set("Retry-After", "10")
	}
	s.answer(w, status, body)
}

// Refuse answers an HTTP request with an error that [Server.Admit] has returned.
func (s *Server) Refuse(w http.ResponseWriter, err error) {
	setHeaders(w)
	var e *Error
	if !errors.As(err, &e) {
		e = errorf(503, "shutting down")
	}
	s.answerError(w, e.Code, e)
}

// write sends an answer and waits until it is on its way, because a reboot may
// follow.
func (s *Server) write(w http.ResponseWriter, status int, body []byte) {
	c := http.NewResponseController(w)
	_ = c.SetWriteDeadline(time.Now().Add(writeTimeout)) // a call may outlast that of the server
	if status != http.StatusNoContent {
		w.Header().Set("Content-Length", strconv.Itoa(len(body)))
	}
	w.WriteHeader(status)
	if _, err := w.Write(body); err != nil && !errors.Is(err, http.ErrBodyNotAllowed) {
		s.log.Debug("rpc: answer not sent", "err", err)
		return
	}
	_ = c.Flush()
}
