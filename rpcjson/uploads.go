package rpcjson

import (
	"context"
	"errors"
	"fmt"
	"io"
	"mime"
	"mime/multipart"
	"net/http"
	"net/url"
	"os"
	"strings"
	"time"

	"github.com/slotota/ota"
)

// Limits of an upload, beside the file.
const (
	maxFields    = 16
	maxField     = 64       // bytes of one value
	maxFormBytes = 64 << 10 // all but the file
	maxDrain     = 1 << 30  // of a file that is not wanted any more
)

// UpdateHandler returns a handler by which people update the device, with the paths
// and answers of Mongoose OS (mongoose-os-libs/ota-http-server), in plain text:
//
//	POST /update         the firmware as a file in a form: curl -F file=@fw.zip http://IP/update
//	POST /update?url=U   OTA.Update
//	POST /update/commit  OTA.Commit
//	POST /update/revert  OTA.Revert
//
// It is to be registered for /update and /update/. The form may have the fields
// commit_timeout, timeout (in seconds) and ignore_same_version (0 or 1), before the
// file, whose name does not matter. They have 20 seconds in all; the file has no
// limit but for each wait, that of timeout. It is not stored but installed as it
// comes; the answer is "1 Update applied, rebooting" or, with status 500, code and
// text of the failure; 409 if another update is under way. With url, the parameters
// are in the query or in a form without file, and the answer is (CODE) TEXT.
// Commit and revert answer Ok, or Error with status 400, and take the parameter
// trial.
//
// Who may do that decides the [Authorizer], for the methods named above; an upload
// is an OTA.Update. The rules against web pages are those of [Server.ServeHTTP], but
// forms are what they can send, so that the header Referer counts, too. The original
// also acts on GET, this only for methods in AllowGET of [Options].
func (s *Server) UpdateHandler() http.Handler { return http.HandlerFunc(s.serveUpdate) }

// text answers a line of text.
func (s *Server) text(w http.ResponseWriter, status int, text string) {
	s.write(w, status, []byte(text+"\r\n"))
}

func (s *Server) serveUpdate(w http.ResponseWriter, r *http.Request) {
	setHeaders(w).Set("Content-Type", "text/plain")
	if r.ProtoMajor == 1 {
		w.Header().Set("Connection", "close")
	}
	method, known := map[string]string{
		"/update": "OTA.Update", "/update/commit": "OTA.Commit", "/update/revert": "OTA.Revert",
	}[strings.TrimSuffix(r.URL.Path, "/")]
	if !known {
		s.text(w, http.StatusNotFound, "no such path")
		return
	}
	e := s.checkBrowser(r)
	if e == nil {
		e = s.checkReferer(r)
	}
	if e == nil && r.Method == http.MethodGet {
		e = s.getAllowed(r, method)
	}
	switch {
	case e != nil && e.Code == http.StatusMethodNotAllowed, r.Method != http.MethodGet && r.Method != http.MethodPost:
		w.Header().Set("Allow", "POST")
		s.text(w, http.StatusMethodNotAllowed, "use POST")
		return
	case e != nil:
		s.log.Warn("update denied", "channel", "HTTP", "peer", r.RemoteAddr, "err", e)
		s.text(w, e.Code, e.Message)
		return
	}
	if !s.o.NoAuth {
		if e := s.limits.blocked(httpPeer(r).key()); e != nil {
			s.refuseUpdate(w, e)
			return
		}
	}
	contentType, _, err := mime.ParseMediaType(r.Header.Get("Content-Type"))
	if contentType == "multipart/form-data" && method == "OTA.Update" && r.Method == http.MethodPost {
		s.serveUpload(w, r)
		return
	}
	form := r.URL.Query()
	switch {
	case r.Method == http.MethodGet:
	case contentType == "application/x-www-form-urlencoded" && err == nil:
		body, e := s.readBody(w, r)
		if e != nil {
			s.text(w, e.Code, e.Message)
			return
		}
		more, err := url.ParseQuery(string(body))
		if err != nil {
			s.text(w, http.StatusBadRequest, "malformed form")
			return
		}
		for k, v := range more {
			form[k] = append(form[k], v...)
		}
	case r.Header.Get("Content-Type") != "" || r.ContentLength > 0:
		s.text(w, http.StatusUnsupportedMediaType, "need a form: multipart/form-data or application/x-www-form-urlencoded")
		return
	}
	s.serveForm(w, r, method, form)
}

// refuseUpdate answers what the call of a method was refused with.
func (s *Server) refuseUpdate(w http.ResponseWriter, e *Error) {
	switch e.Code {
	case 401:
		w.Header().Set("Content-Type", "application/json")
		s.answerError(w, e.Code, e)
	case 403, 404:
		s.text(w, e.Code, e.Message)
	default: // 418, 429
		w.Header().Set("Retry-After", "10")
		s.text(w, http.StatusServiceUnavailable, e.Message)
	}
}

// refused reports whether e comes from before the method.
func refused(e *Error) bool {
	switch e.Code {
	case 401, 403, 404, 418, 429:
		return true
	}
	return false
}

// formArgs makes arguments of those fields of a form that are in names; form has
// their values.
func formArgs(form map[string][]string, names ...string) ([]byte, *Error) {
	b := []byte{'{'}
	for _, name := range names {
		v := form[name]
		switch {
		case len(v) == 0:
			continue
		case len(v) > 1:
			return nil, errorf(400, "more than one %s", name)
		case name == "ignore_same_version" && (v[0] == "0" || v[0] == "false"):
			continue
		case name == "ignore_same_version" && v[0] != "1" && v[0] != "true":
			return nil, errorf(400, "ignore_same_version: need 0 or 1")
		}
		if len(b) > 1 {
			b = append(b, ',')
		}
		b = append(appendString(b, name), ':')
		if name == "ignore_same_version" {
			b = append(b, "true"...)
		} else {
			b = appendString(b, v[0])
		}
	}
	return append(b, '}'), nil
}

// serveForm calls a method with the arguments in a form.
func (s *Server) serveForm(w http.ResponseWriter, r *http.Request, method string, form url.Values) {
	if method == "OTA.Update" && !form.Has("ignore_same_version") {
		form.Set("ignore_same_version", "1") // as the original
	}
	names := []string{"trial"}
	if method == "OTA.Update" {
		names = []string{"url", "timeout", "commit_timeout", "ignore_same_version"}
	}
	params, e := formArgs(form, names...)
	if e != nil {
		s.text(w, e.Code, e.Message)
		return
	}
	_, after, e, err := s.callHTTP(w, r, &frame{method: method, params: token{kindObject, params}})
	switch {
	case err != nil:
		s.text(w, http.StatusServiceUnavailable, "the call was given up; it may still be going on")
		return
	case e != nil && refused(e):
		s.refuseUpdate(w, e)
	case e != nil && e.Code == 400:
		s.text(w, e.Code, e.Message)
	case method != "OTA.Update":
		status, text := http.StatusOK, "Ok"
		if e != nil {
			status, text = http.StatusBadRequest, "Error"
			if e.Message != "" {
				text += ": " + e.Message
			}
		}
		s.text(w, status, text)
	case e == nil:
		s.text(w, http.StatusOK, fmt.Sprintf("(%d) %s", resultOK, s.current().text))
	case form.Get("url") == "" && s.o.UpdateURL == "":
		s.text(w, http.StatusBadRequest, "Update URL not specified and none is configured.")
	case e.Is(ota.ErrBusy):
		s.text(w, http.StatusConflict, "Another update is in progress.")
	default:
		code := e.Code
		if u := s.current(); u != nil && u.over() && u.text == e.Message {
			code = u.code
		}
		s.text(w, http.StatusInternalServerError, fmt.Sprintf("(%d) %s", code, e.Message))
	}
	if after != nil {
		after()
	}
}

// serveUpload installs the file in a form.
func (s *Server) serveUpload(w http.ResponseWriter, r *http.Request) {
	if !s.acquire() {
		s.refuseUpdate(w, errOverflow)
		return
	}
	up := &upload{s: s, r: r, c: http.NewResponseController(w), quota: maxFormBytes, stall: readTimeout}
	_, after, e, err := s.callMethod(r.Context(), httpPeer(r), &frame{method: "OTA.Update"},
		&method{name: "OTA.Update", right: Install, handle: func(ctx context.Context, req *Request) (any, error) {
			up.begun = true
			up.err = up.install(ctx, req)
			return nil, up.err
		}})
	if up.begun {
		up.drain()
	}
	if err != nil && err != ErrClosed && up.err != nil {
		e, err = toError(up.err), nil // a read that failed has ended the context, not the connection
	}
	switch {
	case err != nil:
		s.text(w, http.StatusServiceUnavailable, "the update was given up")
		return
	case e == nil:
		s.text(w, http.StatusOK, fmt.Sprintf("%d %s", resultOK, up.u.text))
	case !up.begun && refused(e):
		s.refuseUpdate(w, e)
	case e.Code == 400:
		s.text(w, e.Code, e.Message)
	case up.u.done == nil && e.Is(ota.ErrBusy):
		s.text(w, http.StatusConflict, "Another update is in progress.")
	default:
		s.text(w, http.StatusInternalServerError, e.Message)
	}
	if after != nil {
		after()
	}
}

// upload is a form on its way in. It reads the body of the request, and, as the
// update does, the file in it.
type upload struct {
	s     *Server
	r     *http.Request
	c     *http.ResponseController
	begun bool // it is authorized
	err   error
	u     update

	stall  time.Duration // 0: no time limit
	armed  time.Time
	read   bool
	inFile bool
	quota  int64 // bytes left for what is not the file
	file   *multipart.Part
	parts  *multipart.Reader
	ctx    context.Context // of the call, then of the update
}

// badForm says why the form cannot be read.
func badForm(err error) *Error {
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return errorf(400, "the form took too long")
	}
	return errorf(400, "malformed form")
}

// endReadWith makes reading end with ctx: a Read that waits does not look at it.
func (up *upload) endReadWith(ctx context.Context) (stop func() bool) {
	up.ctx = ctx
	return context.AfterFunc(ctx, func() { _ = up.c.SetReadDeadline(time.Now()) })
}

// install installs the file of the form, and returns once that is over.
func (up *upload) install(ctx context.Context, req *Request) error {
	s := up.s
	if s.o.Open == nil {
		return errorf(400, "POST updates are disabled.")
	}
	if st := s.d.Status(); st.Busy != "" { // before a byte is read
		return failed(-1, "", ota.ErrBusy)
	}
	stop := up.endReadWith(ctx)
	defer stop()
	up.r.Body = io.NopCloser(up.body(up.r.Body))
	var err error
	if up.parts, err = up.r.MultipartReader(); err != nil {
		return errorf(400, "malformed form")
	}
	form := map[string][]string{}
	for n := 0; !up.inFile; n++ {
		part, err := up.parts.NextRawPart()
		switch {
		case err == io.EOF:
			return errorf(400, "no file in the form")
		case err != nil:
			return badForm(err)
		case n == maxFields:
			return errorf(400, "more than %d fields", maxFields)
		case part.FileName() != "":
			up.file, up.inFile = part, true
			continue
		}
		v, err := io.ReadAll(io.LimitReader(part, maxField+1))
		if err != nil {
			return badForm(err)
		}
		if len(v) > maxField {
			return errorf(400, "%s: need at most %d bytes", ota.Quote(part.FormName()), maxField)
		}
		form[part.FormName()] = append(form[part.FormName()], string(v))
	}
	params, e := formArgs(form, "timeout", "commit_timeout", "ignore_same_version")
	if e != nil {
		return e
	}
	args := &Args{tok: token{kindObject, params}, depth: s.o.MaxDepth}
	stall, o := s.times(args)
	o.IgnoreSameVersion, _ = args.Bool("ignore_same_version")
	if err := args.Err(); err != nil {
		return err
	}
	up.stall, up.armed = stall, time.Time{}
	stop()
	up.u.size.Store(max(0, up.r.ContentLength))
	err = s.install(&up.u, o, rebootAnyway, func(ctx context.Context) (io.ReadCloser, error) {
		return &uploadFile{upload: up, stop: up.endReadWith(ctx)}, nil
	})
	if err != nil {
		return &Error{Code: -1, Message: "-1 " + message(err), Reason: reasonOf(err)}
	}
	<-up.u.done // until then it reads the request
	if up.u.code != resultOK {
		return up.u.failure(-1)
	}
	if !up.u.same {
		req.after = func() { s.rebootSooner(updateDelay) }
	}
	return nil
}

// readerFunc is a reader made of a function.
type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(b []byte) (int, error) { return f(b) }

// body bounds the reading of the request: each wait for the file, and the time and
// the size of the rest.
func (up *upload) body(r io.Reader) io.Reader {
	return readerFunc(func(b []byte) (int, error) {
		if now := time.Now(); up.stall > 0 && (up.armed.IsZero() || up.inFile && now.Sub(up.armed) > time.Second) {
			up.armed = now
			_ = up.c.SetReadDeadline(now.Add(up.stall))
			if up.ctx.Err() != nil { // perhaps just now, so that this has undone its end
				_ = up.c.SetReadDeadline(now)
			}
		}
		up.read = true
		n, err := r.Read(b)
		if !up.inFile {
			if up.quota -= int64(n); up.quota < 0 {
				return 0, errorf(400, "the form is too large")
			}
		}
		return n, err
	})
}

// uploadFile is the file for the update.
type uploadFile struct {
	*upload
	stop func() bool
	end  error // what the end of the file was answered with
}

// Read implements io.Reader.
func (f *uploadFile) Read(b []byte) (int, error) {
	if f.end != nil {
		return 0, f.end
	}
	n, err := f.file.Read(b)
	f.u.taken.Add(int64(n))
	switch {
	case f.ctx.Err() != nil:
		return n, context.Cause(f.ctx)
	case errors.Is(err, os.ErrDeadlineExceeded):
		return n, errTimedOut
	case err == io.EOF:
		// What comes later would be too late.
		f.inFile = false
		if _, next := f.parts.NextRawPart(); next != io.EOF {
			err = errorf(resultFailed, "the file must be the last field of the form")
		} else {
			// The rest may take long, and net/http watches the connection meanwhile.
			f.upload.stall = 0
			_ = f.c.SetReadDeadline(time.Time{})
		}
		f.end = err
	}
	return n, err
}

// Close implements io.Closer.
func (f *uploadFile) Close() error {
	f.stop()
	return nil
}

// drain reads what the client still sends, as browsers show no answer before they
// have sent everything.
func (up *upload) drain() {
	if !up.read && up.r.Header.Get("Expect") != "" {
		return // it waits for the answer before it sends anything
	}
	up.stall, up.inFile = 0, true
	_ = up.c.SetReadDeadline(time.Now().Add(readTimeout))
	_, _ = io.Copy(io.Discard, io.LimitReader(up.r.Body, maxDrain))
}
