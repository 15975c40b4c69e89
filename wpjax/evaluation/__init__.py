"""What a checker says of generated answers: steering tests, fitting of anchors, restoration and knock-out."""
