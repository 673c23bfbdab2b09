package rpcjson

// Header is what a transport needs to know of a frame: to whom a reply goes, or
// which call it answers.
type Header struct {
	ID       string // "" if the frame wants no reply
	Src, Dst string
	Method   string
	// Reply says that the frame has a result or an error.
	Reply bool
}

// ParseHeader decodes the header of a request or reply. The error wraps
// [ErrInvalidFrame] and is that of [Server.Serve], but what nests too deeply or is
// meant for another device is left to that.
func ParseHeader(frame []byte) (Header, error) {
	f, err := parseFrame(frame, 1000)
	if err != nil {
		return Header{}, err
	}
	return Header{ID: f.id, Src: f.src, Dst: f.dst, Method: f.method, Reply: f.reply}, nil
}

// ID returns the id of the device.
func (s *Server) ID() string { return s.o.ID }

// MaxFrame returns the size of the largest frame that is served, in bytes.
func (s *Server) MaxFrame() int { return s.o.MaxFrame }

// RefuseFrame returns the reply that refuses the request in frame with e, and nil
// if the frame wants none or is not for this device.
func (s *Server) RefuseFrame(frame []byte, e *Error) (reply []byte) {
	f, err := s.parse(frame)
	if err != nil || f.method == "" || f.id == "" {
		return nil
	}
	return appendReply(nil, &f, s.o.ID, nil, e)
}

// Overflow is the error that [Server.Serve] answers while Options.MaxPending calls
// are being served; transports with limits of their own answer it with
// [Server.RefuseFrame].
func Overflow() *Error { e := *errOverflow; return &e }
