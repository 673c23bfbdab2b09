package rpcjson

import (
	"errors"
	"fmt"
	"strconv"

	"github.com/slotota/ota"
)

// ErrInvalidFrame says that a frame cannot be understood, or is not meant for
// this device. Channels that belong to one peer (HTTP, an accepted WebSocket)
// are closed then; shared ones (serial line, MQTT) ignore the frame.
var ErrInvalidFrame = errors.New("rpcjson: invalid frame")

// Error is an error as it travels in a reply: a code and, mostly, a message.
// Handlers return one to choose both. [errors.Is] finds what it stands for, such
// as [ota.ErrBusy].
type Error struct {
	Code    int
	Message string // may be empty: the reply then has no message
	// Reason is a word for programs, such as "busy" or "not-committed", for
	// errors whose code tells nothing; "" if there is none. The original has
	// no such member, and its clients ignore it.
	Reason string

	challenges string // WWW-Authenticate of an HTTP answer, one a line
}

func errorf(code int, format string, args ...any) *Error {
	return &Error{Code: code, Message: fmt.Sprintf(format, args...)}
}

// Error returns message and code.
func (e *Error) Error() string {
	if e.Message == "" {
		return "rpcjson: error " + strconv.Itoa(e.Code)
	}
	return fmt.Sprintf("rpcjson: error %d: %s", e.Code, e.Message)
}

// frame is a request, or a response to something this side never asked.
type frame struct {
	id       string // "" = none: nothing is answered
	src, dst string
	tag      string
	method   string // "" = response
	params   token
	args     []argument // the members of params, see maxRemembered; nil if it has none
	auth     []byte
	// paramsErr says that the parameters are damaged: the device of the
	// original would run the method without them. broken says that the frame
	// is, so that there may have been parameters.
	paramsErr, broken error
	reply             bool // has a result or an error
}

// parseFrame decodes a request (mongoose-os-libs/rpc-common, src/mg_rpc.c). The
// members before a syntax error count, but see paramsErr and broken. The error
// wraps ErrInvalidFrame. The frame refers to b.
func parseFrame(b []byte, depth int) (frame, error) {
	var f frame
	var known, badID bool
	var params, args token
	var argsOfArgs, inner []argument
	s := scanner{b: b, depth: depth}
	err := s.object(func(key []byte, v token) {
		k := true
		switch string(key) {
		case "id":
			f.id = v.text()
			badID = v.kind != kindString && v.kind != kindNumber
		case "src":
			f.src = v.text()
		case "dst":
			f.dst = v.text()
		case "tag":
			f.tag = v.text()
		case "method":
			f.method = v.text()
		case "params":
			params, f.args, inner = v, inner, nil
		case "args":
			args, argsOfArgs, inner = v, inner, nil
		case "auth":
			f.auth = v.raw
		case "v":
		case "result", "error":
			f.reply = true
		default:
			k = false
		}
		known = known || k
		inner = inner[:0]
	}, func(key []byte, v token) {
		if len(inner) <= maxRemembered {
			inner = append(inner, argument{key, v})
		}
	})
	if f.params = params; params.kind == kindNone {
		f.params, f.args = args, argsOfArgs
	}
	var me *memberError
	switch {
	case errors.Is(err, errTooDeep):
		return frame{}, fmt.Errorf("%w: %w", ErrInvalidFrame, err)
	case errors.As(err, &me) && (string(me.key) == "params" || string(me.key) == "args"):
		f.paramsErr = me.err
	case !harmless(err):
		f.broken = err
	}
	switch {
	case !known && err != nil:
		return frame{}, fmt.Errorf("%w: %w", ErrInvalidFrame, err)
	case !known:
		return frame{}, fmt.Errorf("%w: no known member", ErrInvalidFrame)
	case badID:
		return frame{}, fmt.Errorf("%w: id: need a number or a string", ErrInvalidFrame)
	case f.method == "" && f.id == "":
		return frame{}, fmt.Errorf("%w: neither method nor id", ErrInvalidFrame)
	}
	return f, nil
}

// appendReply appends the reply to f: result, or e if it is not nil.
func appendReply(dst []byte, f *frame, device string, result []byte, e *Error) []byte {
	dst = append(dst, `{"id":`...)
	if isNumber(f.id) {
		dst = append(dst, f.id...)
	} else {
		dst = appendString(dst, f.id)
	}
	src := device
	if f.dst != "" {
		src = f.dst
	}
	dst = append(dst, `,"src":`...)
	dst = appendString(dst, src)
	if f.src != "" {
		dst = append(dst, `,"dst":`...)
		dst = appendString(dst, f.src)
	}
	if f.tag != "" {
		dst = append(dst, `,"tag":`...)
		dst = appendString(dst, f.tag)
	}
	if e != nil {
		dst = append(dst, `,"error":`...)
		dst = appendError(dst, e)
	} else {
		dst = append(dst, `,"result":`...)
		dst = append(dst, result...)
	}
	return append(dst, '}')
}

// appendError appends the error object, which unlike results has no blanks.
func appendError(dst []byte, e *Error) []byte {
	dst = append(dst, `{"code":`...)
	dst = strconv.AppendInt(dst, int64(e.Code), 10)
	if e.Message != "" {
		dst = append(dst, `,"message":`...)
		dst = appendString(dst, e.Message)
	}
	if e.Reason != "" {
		dst = append(dst, `,"reason":`...)
		dst = appendString(dst, e.Reason)
	}
	return append(dst, '}')
}

// isNumber reports whether an id is printed without quotes: digits only, as in
// the original, but not what would be no JSON number (007).
func isNumber(id string) bool {
	for i := range len(id) {
		if !isDigit(id[i]) {
			return false
		}
	}
	return id == "0" || id != "" && id[0] != '0'
}

// printable returns s for use inside a message: as it is if it is short and
// plain, else quoted and cut.
func printable(s string) string {
	for i := range len(s) {
		if s[i] <= ' ' || s[i] >= 0x7f {
			return ota.Quote(s)
		}
	}
	if len(s) > 128 {
		return ota.Quote(s)
	}
	return s
}
